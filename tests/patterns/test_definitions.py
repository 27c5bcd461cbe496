"""Each pattern equals its definition as a loop over numbers, and its parts hold exactly the same pairs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse import Sinks, SlidingWindow, TopKBlocks, get_pattern
from hf_sparse.patterns import static_patterns
from hf_sparse.patterns.probe import parts_mask

from .definitions import (
    CALLS,
    DEFINITIONS,
    HEADS,
    LAYERS,
    LEAVES,
    OPTIONS,
    PATTERNS,
    Call,
    defined_mask,
    named,
)


def mask_of(pattern, call, q_len=None):
    return pattern.mask(
        q_len or call.length,
        call.length,
        heads=call.heads,
        causal=call.causal,
        layer=call.layer,
        chosen=call.chosen,
    )


def check(pattern, call):
    mask = mask_of(pattern, call)
    assert torch.equal(mask, defined_mask(pattern, call))
    held = parts_mask(pattern.parts(call.context), call.heads, call.length)
    assert torch.equal(held.tril() if call.causal else held, mask)
    assert torch.equal(mask_of(pattern, call, q_len=1), mask[:, -1:])


def test_every_pattern_has_a_definition_and_random_options():
    assert set(static_patterns()) == set(DEFINITIONS) == set(OPTIONS)


@pytest.mark.parametrize("name", static_patterns())
@settings(max_examples=60, deadline=None)
@given(data=st.data(), call=CALLS)
def test_mask_and_parts_are_the_definition(name, data, call):
    check(data.draw(named(name)), call)


@settings(max_examples=120, deadline=None)
@given(pattern=PATTERNS, call=CALLS)
def test_compositions_of_anything_are_the_definition(pattern, call):
    pattern.check_fit(HEADS, LAYERS)
    check(pattern, call)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [1, 2, 5])
@pytest.mark.parametrize("name", static_patterns())
def test_the_default_options_are_the_definition_on_a_short_text(name, heads, causal):
    check(get_pattern(name), Call(causal, heads, layer=3, length=9))


@settings(max_examples=60, deadline=None)
@given(pattern=LEAVES, q_len=st.integers(1, 11), causal=st.booleans(), layer=st.integers(0, LAYERS - 1))
def test_decoding_rows_are_the_last_rows_of_the_whole_mask(pattern, q_len, causal, layer):
    call = Call(causal, layer=layer, length=11)
    assert torch.equal(mask_of(pattern, call, q_len), mask_of(pattern, call)[:, -q_len:])


@settings(max_examples=60, deadline=None)
@given(pattern=LEAVES, layer=st.integers(0, LAYERS - 1), more=st.integers(1, 9))
def test_later_tokens_change_nothing_for_earlier_ones_in_causal_models(pattern, layer, more):
    short, long = (mask_of(pattern, Call(layer=layer, length=9 + extra)) for extra in (0, more))
    assert torch.equal(long[:, :9, :9], short)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sliding_window", {}),
        ("streaming_llm", {"sinks": 0}),
        ("dilated_window", {"dilation": 3}),
        ("multi_scale", {"scales": 3}),
        ("longformer", {"global_tokens": ()}),
        ("longformer", {"global_tokens": (), "dilation": 2}),
        ("grouped_heads", {"local_heads": 3, "adaptive_window": False}),
    ],
)
def test_window_one_is_the_token_itself(name, options):
    mask = get_pattern(name, window=1, **options).mask(6, heads=3)
    assert torch.equal(mask, torch.eye(6, dtype=torch.bool).expand(3, 6, 6))


def test_atrous_local_is_the_merged_sparse_transformer():
    ours, theirs = get_pattern("atrous_local", stride=4), get_pattern("sparse_transformer_strided", stride=4)
    assert torch.equal(ours.mask(23), theirs.mask(23))
    assert torch.equal(ours.mask(23, causal=False), theirs.mask(23, causal=False))


def test_sinks_and_a_window_are_streaming_llm():
    ours, theirs = Sinks(4) | SlidingWindow(3), get_pattern("streaming_llm", sinks=4, window=3)
    assert torch.equal(ours.mask(17), theirs.mask(17))
    assert torch.equal(ours.mask(17, causal=False), theirs.mask(17, causal=False))
    assert (TopKBlocks(keep=2) | ours).members[1:] == ours.members == (Sinks(4), SlidingWindow(3))


def test_few_parts_are_enough():
    """The plan pays for each part: the numbers that the forms of the patterns allow."""
    causal, both = Call().context, Call(causal=False, length=1000).context
    for name, options, few, bidirectional in [
        ("block_local", {}, 1, 1),
        ("sliding_window", {}, 1, 1),
        ("dilated_window", {"dilation": (1, 4, 1)}, 2, 2),
        ("sparse_transformer_fixed", {}, 2, 2),
        ("sparse_transformer_strided", {}, 2, 2),
        ("multi_scale", {"scales": 4}, 4, 4),
        ("shifted", {}, 2, 2),
        ("bigbird", {}, 3, 5),
    ]:
        pattern = get_pattern(name, **options)
        assert (len(pattern.parts(causal)), len(pattern.parts(both))) == (few, bidirectional), name


@pytest.mark.parametrize(
    ("window", "seq_len", "adapted"), [(128, 512, 256), (128, 100, 113), (128, 100_000, 512), (64, 4, 32)]
)
def test_the_adaptive_window_is_fixed_by_resolve_once(window, seq_len, adapted):
    pattern = get_pattern("grouped_heads", window=window).resolve(seq_len)
    assert pattern == get_pattern("grouped_heads", window=adapted, adaptive_window=False)
    assert pattern.resolve(10**6) == pattern
    assert (SlidingWindow(3) | get_pattern("grouped_heads")).resolve(512).members[1].window == 256
