"""generate() gives the same tokens with every stock cache and without one."""

import pytest
import torch
from tiny_models import DECODERS, logits, tiny, tokens
from transformers import DynamicCache, StaticCache

import hf_sparse
from hf_sparse import Longformer, SlidingWindow, StreamingLLM, Strided

PATTERNS = [
    SlidingWindow(window=5),
    StreamingLLM(sinks=2, window=4),
    Longformer(window=3, global_tokens=(0, 7)) | Strided(stride=4),
]
GREEDY = {"do_sample": False, "max_new_tokens": 14, "pad_token_id": 1}


def _left_padded():
    ids = tokens(2, 17)
    mask = torch.ones_like(ids)
    mask[1, :6], ids[1, :6] = 0, 1
    return ids, mask


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_every_cache_gives_the_tokens_of_no_cache(name, pattern):
    model = hf_sparse.patch_model(tiny(name), pattern)
    ids, mask = _left_padded()
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)
    static = model.generate(
        ids, attention_mask=mask, cache_implementation="static", disable_compile=True, **GREEDY
    )
    assert torch.equal(static, expected)
    alone = model.generate(ids[1:, 6:], attention_mask=mask[1:, 6:], **GREEDY)
    assert torch.equal(alone[0], expected[1, 6:])


@pytest.mark.parametrize("pads", [None, 0, 5], ids=["no-mask", "all-ones", "left-padded"])
@pytest.mark.parametrize("name", DECODERS)
def test_prefill_in_chunks_and_token_by_token_gives_the_same_logits(name, pads):
    model = hf_sparse.patch_model(tiny(name), StreamingLLM(sinks=2, window=4))
    ids, mask = tokens(2, 24), torch.ones(2, 24, dtype=torch.long)
    mask[1, : pads or 0] = 0
    whole = logits(model, ids, **({} if pads is None else {"attention_mask": mask}))
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)):
        parts = []
        for start, stop in ((0, 7), (7, 18), (18, 19), (19, 20), (20, 24)):
            seen = {} if pads is None else {"attention_mask": mask[:, :stop]}
            parts.append(logits(model, ids[:, start:stop], past_key_values=cache, use_cache=True, **seen))
        torch.testing.assert_close(torch.cat(parts, 1)[mask == 1], whole[mask == 1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_beam_search_is_the_same_with_and_without_cache(name):
    model = hf_sparse.patch_model(tiny(name), "sliding_window", window=5)
    ids, mask = _left_padded()
    search = {"num_beams": 3, "num_return_sequences": 2, **GREEDY}
    cached = model.generate(ids, attention_mask=mask, **search)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **search))


def test_a_cropped_cache_continues_as_if_never_extended():
    model = hf_sparse.patch_model(tiny("llama"), "streaming_llm", sinks=1, window=4)
    ids = tokens(1, 16)
    with torch.no_grad():
        cache = model(ids).past_key_values
        cache.crop(-6)
        again = model(ids[:, 10:], past_key_values=cache).logits
    torch.testing.assert_close(again, logits(model, ids)[:, 10:], atol=1e-5, rtol=1e-4)


def test_leaving_patched_gives_generate_back_as_it_was():
    model = tiny("llama", "sparse_sliding_window")  # by name alone: nothing prepares its caches
    ids = tokens(1, 20)
    before = model.generate(ids, **GREEDY)
    with hf_sparse.patched(model, "streaming_llm", sinks=1, window=4):
        assert (
            type(model.generate(ids, return_dict_in_generate=True, **GREEDY).past_key_values)
            is not DynamicCache
        )
    after = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    assert type(after.past_key_values) is DynamicCache and torch.equal(after.sequences, before)
