"""A cache holds what its pattern leaves to be seen, and never more than the slots of one drop besides."""

import math

import pytest
import torch
from caching import decoder, fed
from tiny_models import tokens

import hf_sparse
from hf_sparse import (
    BigBird,
    BlockLocal,
    DilatedWindow,
    GlobalTokens,
    Longformer,
    MultiScale,
    Random,
    Shifted,
    Sinks,
    SlidingWindow,
    SparseTransformerFixed,
    SparseTransformerStrided,
    StreamingLLM,
    Strided,
)
from hf_sparse.plan import held

PER_SLOT = 2 * 2 * 8 * 4  # bytes of a layer of the tiny llama: key and value, 2 heads of 8, fp32
# After n tokens a cache may hold this many, the slots of one drop apart.
MOST = [
    (SlidingWindow(window=9), lambda n: 8),
    (Sinks(3), lambda n: 3),
    (StreamingLLM(sinks=3, window=9), lambda n: 3 + 8),
    (StreamingLLM(sinks=3, window=9, positions="cache"), lambda n: 3 + 8),
    (Longformer(window=5, global_tokens=(0, 30)), lambda n: 2 + 4),
    (BlockLocal(block=6, neighbours=1), lambda n: 2 * 6),
    (Shifted(group=8), lambda n: 8),
    (DilatedWindow(window=4, dilation=3), lambda n: 4 * 3),
    (MultiScale(window=3, scales=3), lambda n: 3 * 4),
    (SparseTransformerFixed(block=8, summary=2), lambda n: math.ceil(n / 8) * 2 + 8),
    (Strided(stride=6, anchor="absolute"), lambda n: math.ceil(n / 6)),
    (GlobalTokens(ratio=0.1), lambda n: math.ceil(n / 10)),
    (Strided(stride=6), lambda n: n),
    (SparseTransformerStrided(stride=6), lambda n: n),
    (Random(keys_per_query=4), lambda n: n),
    (BigBird(block=4), lambda n: n),
]


@pytest.mark.parametrize(
    ("pattern", "most"), MOST, ids=lambda x: str(x) if isinstance(x, hf_sparse.Pattern) else ""
)
@pytest.mark.parametrize("slack", [3, 128])
def test_slots_follow_the_table(pattern, most, slack, monkeypatch):
    monkeypatch.setattr(held, "SLACK", slack)
    model = decoder("llama", pattern)
    cache, ids, seen = hf_sparse.make_cache(model), tokens(1, 340), 0
    for length in (1, 2, 90, 7, 50, *(1,) * 20, *(5,) * 34):
        fed(model, ids[:, seen : seen + length], cache, (length,))
        seen += length
        assert cache.kept <= most(seen) + slack
        assert cache.nbytes == sum(layer.nbytes for layer in cache.layers)
        assert cache.nbytes <= len(cache.layers) * PER_SLOT * (most(seen) + slack)
    assert cache.get_seq_length() == seen == 340


@pytest.mark.parametrize("positions", ["absolute", "cache"])
def test_streaming_holds_its_sinks_its_window_and_128_slots_at_every_length(positions):
    model = decoder("llama", StreamingLLM(sinks=4, window=20, positions=positions))
    cache, ids = hf_sparse.make_cache(model), tokens(2, 500)
    nbytes = []
    for start in range(500):
        fed(model, ids[:, start : start + 1], cache, (1,))
        nbytes.append(cache.nbytes)
    assert max(nbytes) <= 2 * 2 * PER_SLOT * (20 + 4 + 128)  # rows, layers
    assert len(set(nbytes[200:])) == 1


def test_a_row_with_padding_holds_no_more():
    model = decoder("llama", StreamingLLM(sinks=4, window=20))
    cache, ids, mask = hf_sparse.make_cache(model), tokens(2, 400), torch.ones(2, 400, dtype=torch.long)
    mask[1, :150] = 0
    fed(model, ids, cache, (300, *(1,) * 100), mask)
    assert cache.nbytes <= 2 * 2 * PER_SLOT * (20 + 4 + 128) and cache.kept <= 20 + 4 + 128


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_layers_that_the_model_bounds_itself_stay_bounded(name):
    model = decoder(name, StreamingLLM(sinks=2, window=6))
    cache = hf_sparse.make_cache(model)
    fed(model, tokens(1, 400), cache, (100, 200, *(1,) * 100))
    assert all(layer.keys.shape[2] <= 9 + 128 for layer in cache.layers)


def test_beams_hold_what_rows_hold():
    model, ids = decoder("llama", SlidingWindow(window=6)), tokens(2, 20)
    out = model.generate(
        ids, num_beams=4, max_new_tokens=200, do_sample=False, pad_token_id=1, return_dict_in_generate=True
    )
    assert out.past_key_values.nbytes <= 2 * 2 * 4 * PER_SLOT * (6 + 128)
