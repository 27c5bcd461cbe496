"""At which distance each pair is scored: the published rules as loops over tokens, and which compositions have them."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse import (
    Full,
    Layered,
    Longformer,
    PerHead,
    PerLayer,
    ReRoPE,
    SelfExtend,
    SlidingWindow,
    StreamingLLM,
    Strided,
    Union,
)
from hf_sparse.patterns import pattern_from_json, pattern_to_json
from hf_sparse.patterns.places import Place, Places

from .definitions import LAYERS, UNPLACED

CACHED = StreamingLLM(sinks=2, window=3, positions="cache")
POSITIVE = st.integers(1, 9)


def distances(pattern, length):
    """Return the distance of every pair (q, k) that the pattern allows."""
    position = torch.arange(length)
    found = pattern.places(0).distance(position[:, None], position)
    return {(q, k): int(found[q, k]) for q, k in pattern.mask(length)[0].nonzero().tolist()}


@settings(max_examples=60, deadline=None)
@given(sinks=st.integers(0, 5), window=POSITIVE, length=st.integers(1, 30))
def test_streaming_places_are_those_of_the_published_cache(sinks, window, length):
    """The cache holds `sinks` first and `recent` last tokens, and a token comes in behind those it holds."""
    recent, held, expected = window - 1, [], {}
    for q in range(length):
        held.append(q)
        query = len(held) - 1
        expected |= {(q, k): query - place for place, k in enumerate(held)}
        if len(held) > sinks + recent:
            held = held[:sinks] + held[len(held) - recent :]
    assert distances(StreamingLLM(sinks, window, "cache"), length) == expected


@settings(max_examples=60, deadline=None)
@given(window=POSITIVE, group=POSITIVE, length=st.integers(1, 30), pattern=UNPLACED)
def test_rerope_and_self_extend_are_their_formulas(window, group, length, pattern):
    pairs = {(q, k) for q, k in Full().mask(length)[0].nonzero().tolist()}
    assert distances(ReRoPE(window), length) == {(q, k): min(q - k, window) for q, k in pairs}
    far = {(q, k): q // group + window - window // group - k // group for q, k in pairs}
    assert distances(SelfExtend(group, window), length) == {
        (q, k): q - k if q - k < window else far[q, k] for q, k in pairs
    }
    for wrapped in (ReRoPE(window, pattern), SelfExtend(group, window, pattern)):
        assert wrapped.places(0) == type(wrapped)(**{**wrapped.options(), "pattern": "full"}).places(None)


@pytest.mark.parametrize(("trained", "group", "window"), [(4096, 8, 1024), (2048, 16, 512), (4096, 8, 1001)])
def test_the_length_that_self_extend_promises_stays_within_the_trained_one(trained, group, window):
    length = window + (trained - window) * group
    places = SelfExtend(group, window).places(None)
    query = torch.tensor(length - 1)
    assert trained - 2 <= int(places.distance(query, torch.tensor(0))) <= trained
    assert int(ReRoPE(window).places(None).distance(query, torch.tensor(0))) == window


def test_a_schedule_asks_the_pattern_of_the_layer():
    for schedule in (PerLayer((SlidingWindow(2), CACHED)), Layered({1: CACHED})):
        assert schedule.places(0) is None
        assert schedule.places(1) == schedule.places(None) == CACHED.places(None)
    every = Layered(pattern=ReRoPE(4, "strided"), dense_every=2)
    assert [every.places(layer) is None for layer in range(4)] == [False, True, False, True]
    assert Layered().places(None) is None and StreamingLLM().places(None) is None


@settings(max_examples=60, deadline=None)
@given(pattern=UNPLACED)
def test_a_wrapper_is_what_it_wraps_in_all_but_distances(pattern):
    wrapped = ReRoPE(5, pattern)
    assert wrapped.members == (pattern,) and wrapped.per_layer == pattern.per_layer
    assert wrapped.takes_globals == pattern.takes_globals
    assert wrapped.global_token_ids == pattern.global_token_ids
    assert pattern.places(None) is None and all(pattern.places(layer) is None for layer in range(LAYERS))
    assert wrapped.resolve(400) == ReRoPE(5, pattern.resolve(400))
    saved = json.loads(json.dumps(pattern_to_json(wrapped)))
    assert pattern_from_json(saved) == wrapped == ReRoPE(5, pattern_to_json(pattern))


def test_a_wrapper_is_written_with_what_it_wraps():
    assert str(ReRoPE(4, SlidingWindow(2) | Strided(3, "absolute"))) == (
        "rerope(window=4, pattern=sliding_window(window=2) | strided(stride=3, anchor='absolute'))"
    )
    assert str(SelfExtend()) == "self_extend(group=8, window=1024, pattern=full())"
    with pytest.raises(ValueError, match="dilation has 3 entries and the model has 4 query heads"):
        ReRoPE(pattern=Longformer(dilation=(1, 2, 3))).check_fit(heads=4, layers=1)


@pytest.mark.parametrize(
    ("compose", "owner"),
    [
        (lambda placed: placed | Strided(3), "a union"),
        (lambda placed: Union((Strided(3), placed)), "a union"),
        (lambda placed: PerHead((Strided(3), placed)), "PerHead"),
        (lambda placed: Strided(3) | Layered({1: placed}), "a union"),
        (lambda placed: PerHead((PerLayer((Full(), placed)),)), "PerHead"),
    ],
)
@pytest.mark.parametrize("placed", [CACHED, ReRoPE(), SelfExtend(pattern="strided")], ids=str)
def test_patterns_of_one_layer_cannot_set_distances(compose, owner, placed):
    message = "sets the distances of far keys, as a pair would then have two; leave its positions 'absolute', or wrap"
    with pytest.raises(ValueError, match=f"^{owner} cannot hold .*{re.escape(message)}"):
        compose(placed)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Place(div=0), "div must be >= 1, got 0"),
        (lambda: Place(mul=-1), "mul must be >= 0, got -1"),
        (lambda: Place(most=-1), "most must be >= 0, got -1"),
        (lambda: Places(0, Place(), Place()), "near must be >= 1, got 0"),
    ],
)
def test_places_that_mean_nothing_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
