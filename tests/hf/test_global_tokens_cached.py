"""The global tokens of earlier calls are remembered with the cache: in generation, by beams, in chunks."""

import copy
import pickle

import pytest
import torch
from tiny_models import logits, longformer, rows_with_globals, tiny, tokens
from transformers import DynamicCache

import hf_sparse
from hf_sparse import SlidingWindow
from hf_sparse.patterns.global_tokens import GlobalTokens

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
GREEDY = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 1}


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "opt"])
def test_generation_is_the_same_with_every_cache_and_without(name):
    ids, mask, chosen = (x[:2] for x in rows_with_globals("left"))
    model = hf_sparse.patch_model(tiny(name), SlidingWindow(3) | GlobalTokens((), token_ids=(7, 9, 40)))
    ids[1, 10] = 7
    given = {"attention_mask": mask, "global_attention_mask": chosen, **GREEDY}
    expected = model.generate(ids, use_cache=False, **given)
    assert torch.equal(model.generate(ids, **given), expected)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(ids, **static, **given), expected)
    assert torch.equal(model.generate(ids, prefill_chunk_size=6, **given), expected)
    search = {"num_beams": 3, "num_return_sequences": 2, **given}
    beams = model.generate(ids, use_cache=False, **search)
    assert torch.equal(model.generate(ids, **search), beams)
    local = model.generate(ids, attention_mask=mask, **GREEDY)
    assert not torch.equal(local, expected)


def test_beams_take_the_globals_of_their_own_tokens_along():
    """The ids that beam search proposes are global, so its beams differ in their globals and swap rows."""
    model = hf_sparse.patch_model(
        tiny("llama"), SlidingWindow(2) | GlobalTokens((), token_ids=tuple(range(4, 64, 2)))
    )
    ids, search = tokens(2, 8), {"num_beams": 4, **GREEDY}
    expected = model.generate(ids, use_cache=False, **search)
    assert torch.equal(model.generate(ids, **search), expected)
    cache_class = DynamicCache
    seen = []

    class Watched(cache_class):
        def reorder_cache(self, beam_idx):
            seen.append(not torch.equal(beam_idx, torch.arange(len(beam_idx))))
            super().reorder_cache(beam_idx)

    assert torch.equal(model.generate(ids, past_key_values=Watched(config=model.config), **search), expected)
    assert any(seen), "no beam ever changed its row"


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_prefill_in_chunks_remembers_the_globals_of_earlier_tokens(name):
    model = hf_sparse.patch_model(tiny(name), SlidingWindow(3) | GlobalTokens((), token_ids=(7,)))
    ids, mask, chosen = rows_with_globals("left")
    ids[0, 4] = 7
    whole = logits(model, ids, attention_mask=mask, global_attention_mask=chosen)
    for whole_width in (True, False):
        cache, parts = DynamicCache(config=model.config), []
        for start, stop in ((0, 7), (7, 12), (12, 13), (13, 20)):
            given = chosen[:, 0 if whole_width else start : stop]
            seen = {"attention_mask": mask[:, :stop], "global_attention_mask": given}
            parts.append(logits(model, ids[:, start:stop], past_key_values=cache, **seen))
        torch.testing.assert_close(torch.cat(parts, 1)[mask == 1], whole[mask == 1], **CLOSE)
    silent = logits(model, ids[:, :1], past_key_values=cache)  # earlier globals need no second mention
    again = logits(
        model, torch.cat([ids, ids[:, :1]], 1), global_attention_mask=torch.nn.functional.pad(chosen, (0, 1))
    )
    assert silent.shape == (3, 1, 64) and again.shape[1] == 21
    assert cache.global_flags.shape == (3, 21)


def test_a_cache_changes_the_flags_with_its_rows_and_tokens():
    model = longformer("llama")
    chosen = torch.zeros(2, 12, dtype=torch.long)
    chosen[0, 3] = chosen[1, [5, 10]] = 1
    with torch.no_grad():
        cache = model(tokens(2, 12), global_attention_mask=chosen).past_key_values
    flags = chosen.bool()
    assert type(cache).__name__ == "DynamicCache" and isinstance(cache, DynamicCache)
    assert torch.equal(copy.deepcopy(cache).global_flags, flags)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 3]))
    cache.crop(-3)
    assert torch.equal(cache.global_flags, flags[[1, 0, 0], :9])
    cache.reset()
    assert cache.global_flags.shape == (3, 0)


def test_what_a_cache_cannot_know_is_refused():
    words = hf_sparse.patch_model(tiny("llama"), "global_tokens", token_ids=(7,))
    ids = tokens(1, 12)
    with torch.no_grad():
        cache = tiny("llama")(ids[:, :8]).past_key_values
        with pytest.raises(
            ValueError, match=r"8 tokens of which it is not known whether they are among token_ids=\(7,"
        ):
            words(ids[:, 8:], past_key_values=cache)
        cache = words(ids[:, :8]).past_key_values
        late = torch.isin(torch.arange(12), 2)[None].long()
        with pytest.raises(
            ValueError, match="makes token 2 of row 0 global, which is in the cache as a local one"
        ):
            words(ids[:, 8:], past_key_values=cache, global_attention_mask=late)
        cache.layers[0].crop(-2)
        with pytest.raises(ValueError, match="remembers the globals of 1 x 8 tokens but holds 1 x 6"):
            words(ids[:, 8:], past_key_values=cache)
    with pytest.raises(ValueError, match=r"token_ids=\(7,\) cannot be found in inputs_embeds"):
        words(inputs_embeds=words.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="covers 5 tokens but the prompt has 12"):
        words.generate(ids, global_attention_mask=torch.ones(1, 5), **GREEDY)


def test_a_pickled_model_and_a_pickled_cache_keep_their_globals():
    ids = tokens(2, 14)
    chosen = torch.zeros_like(ids)
    chosen[0, 2] = chosen[1, 9] = 1
    model = longformer("llama")
    again = pickle.loads(pickle.dumps(model))
    given = {"global_attention_mask": chosen, **GREEDY}
    expected = model.generate(ids, **given)
    assert torch.equal(again.generate(ids, **given), expected)
    assert again.prepare_inputs_for_generation.model is again
    assert not torch.equal(model.generate(ids, **GREEDY), expected)
    hf_sparse.unpatch_model(again)
    assert "prepare_inputs_for_generation" not in vars(again)
    cache, last = DynamicCache(config=model.config), {"global_attention_mask": chosen}
    logits(model, ids[:, :11], past_key_values=cache, global_attention_mask=chosen[:, :11])
    stored = pickle.loads(pickle.dumps(cache))
    wanted = logits(model, ids[:, 11:], past_key_values=cache, **last)
    assert torch.equal(logits(model, ids[:, 11:], past_key_values=stored, **last), wanted)
    stored.batch_select_indices(torch.tensor([1]))
    assert stored.global_flags.shape == (1, 14)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_from_embeddings_is_that_from_tokens(name):
    ids = tokens(2, 12)
    chosen = torch.zeros_like(ids)
    chosen[0, 2] = chosen[1, 6] = 1
    model = longformer(name)
    embeds = model.get_input_embeddings()(ids)
    expected = model.generate(ids, global_attention_mask=chosen, **GREEDY)[:, 12:]
    assert torch.equal(model.generate(inputs_embeds=embeds, global_attention_mask=chosen, **GREEDY), expected)
