"""The cache of a decoder that attends to an encoder, and what generate() does with it."""

import pytest
import torch
from encoder_decoder_models import (
    CLOSE,
    PATTERNS,
    SIZES,
    N,
    both_inputs,
    logits,
    randomized,
    tiny_pair,
)
from transformers import BartConfig, BartForConditionalGeneration, DynamicCache, EncoderDecoderCache

import hf_sparse
from hf_sparse import Full, PerHead, SlidingWindow, StreamingLLM
from hf_sparse.hf.decoder_cache import SparseDecoderCache

GREEDY = {"do_sample": False, "max_new_tokens": 14}


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_makes_the_cache_by_itself(beams):
    model = hf_sparse.patch_model(tiny_pair("bart"), "sliding_window", window=4)
    source = {key: value for key, value in both_inputs().items() if key != "decoder_input_ids"}
    out = model.generate(**source, num_beams=beams, return_dict_in_generate=True, **GREEDY)
    assert isinstance(out.past_key_values, SparseDecoderCache)
    assert out.past_key_values.kept > 0


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", ["bart", "mbart", "marian"])
def test_every_cache_generates_the_tokens_of_no_cache(name, pattern):
    model = hf_sparse.patch_model(tiny_pair(name), pattern)
    source = {key: value for key, value in both_inputs().items() if key != "decoder_input_ids"}
    expected = model.generate(**source, use_cache=False, **GREEDY)
    own = hf_sparse.make_cache(model)
    stock = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for extra in (
        {},
        {"past_key_values": own},
        {"past_key_values": stock},
        {"cache_implementation": "static", "disable_compile": True},
    ):
        assert torch.equal(model.generate(**source, **extra, **GREEDY), expected)
    assert own.get_seq_length() == expected.shape[1] - 1
    beams = {"num_beams": 3, "num_return_sequences": 2, **GREEDY}
    assert torch.equal(model.generate(**source, **beams), model.generate(**source, use_cache=False, **beams))


@pytest.mark.parametrize("pattern", [SlidingWindow(4), PerHead((Full(),) + (SlidingWindow(4),) * 3)], ids=str)
@pytest.mark.parametrize("encoder_layers", [1, 5])
def test_a_decoder_may_have_more_layers_than_its_encoder_or_fewer(encoder_layers, pattern):
    config = BartConfig(**SIZES | {"encoder_layers": encoder_layers, "decoder_layers": 3})
    model = hf_sparse.patch_model(randomized(BartForConditionalGeneration(config)), pattern)
    source = {key: value for key, value in both_inputs().items() if key != "decoder_input_ids"}
    out = model.generate(**source, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, model.generate(**source, use_cache=False, **GREEDY))
    assert len(out.past_key_values.self_attention_cache.layers) == 3
    assert "3 of 3 sparse" in hf_sparse.describe(model)


@pytest.mark.parametrize("name", ["bart", "marian"])
def test_a_long_decoder_prompt_generates_the_same_while_keys_are_dropped(name):
    model = hf_sparse.patch_model(tiny_pair(name), "streaming_llm", sinks=2, window=4)
    inputs = both_inputs(length=170)
    real = torch.ones(2, 170, dtype=torch.long)
    real[0, :20] = 0
    inputs["decoder_attention_mask"] = real
    cache = hf_sparse.make_cache(model)
    dense = EncoderDecoderCache(DynamicCache(), DynamicCache())
    generated = model.generate(**inputs, past_key_values=cache, **GREEDY)
    assert torch.equal(generated, model.generate(**inputs, past_key_values=dense, **GREEDY))
    assert torch.equal(generated, model.generate(**inputs, use_cache=False, **GREEDY))
    assert cache.get_seq_length() == generated.shape[1] - 1
    assert cache.kept <= 2 + 4 + 128
    across = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.cross_attention_cache.layers)
    assert (
        across
        < cache.nbytes
        < across + sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.self_attention_cache.layers)
    )


@pytest.mark.parametrize("pads", [None, 5], ids=["no-mask", "left-padded"])
@pytest.mark.parametrize("name", ["bart", "mbart", "marian"])
def test_chunks_and_single_tokens_give_the_logits_of_the_whole(name, pads):
    length = 160
    model = hf_sparse.patch_model(tiny_pair(name), StreamingLLM(sinks=2, window=4))
    inputs, mask = both_inputs(length), torch.ones(2, length, dtype=torch.long)
    mask[1, : pads or 0] = 0
    ids = inputs.pop("decoder_input_ids")
    given = {} if pads is None else {"decoder_attention_mask": mask}
    whole = logits(model, **inputs, decoder_input_ids=ids, **given)
    cache, parts = hf_sparse.make_cache(model), []
    for start, stop in ((0, 7), (7, 150), (150, 151), (151, 152), (152, length)):
        if pads is not None:
            given = {"decoder_attention_mask": mask[:, :stop]}
        part = {"decoder_input_ids": ids[:, start:stop], "past_key_values": cache}
        parts.append(logits(model, **inputs, **part, **given))
    torch.testing.assert_close(torch.cat(parts, 1)[mask == 1], whole[mask == 1], **CLOSE)
    assert cache.kept < length


@pytest.mark.parametrize("own", [True, False], ids=["own", "stock"])
def test_global_tokens_of_the_decoder_are_remembered_by_the_cache(own):
    pattern = SlidingWindow(window=3) | hf_sparse.get_pattern("global_tokens", token_ids=(5, 7, 9, 11))
    model, inputs = hf_sparse.patch_model(tiny_pair("bart"), pattern), both_inputs()
    whole, ids = logits(model, **inputs), inputs.pop("decoder_input_ids")
    cache = hf_sparse.make_cache(model) if own else EncoderDecoderCache(DynamicCache(), DynamicCache())
    parts = [
        logits(model, **inputs, decoder_input_ids=ids[:, start:stop], past_key_values=cache)
        for start, stop in ((0, 9), (9, 10), (10, N))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)


def test_assisted_generation_takes_tokens_back_from_the_decoder():
    model = hf_sparse.patch_model(tiny_pair("bart"), "sliding_window", window=4)
    assistant = hf_sparse.patch_model(tiny_pair("bart"), "sliding_window", window=3)
    source = {key: value[:1] for key, value in both_inputs().items() if key != "decoder_input_ids"}
    alone = model.generate(**source, **GREEDY)
    assert torch.equal(model.generate(**source, assistant_model=assistant, **GREEDY), alone)
