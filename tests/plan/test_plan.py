"""A plan holds exactly the allowed pairs, each once, whatever the lengths, offsets and constraints."""

import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse import Full, Longformer, PerHead, SlidingWindow, StreamingLLM, Strided
from hf_sparse.patterns.base import Pattern
from hf_sparse.plan import Constraint, Segments, cost, make_plan

from .holding import check

PATTERNS = [
    Full(),
    SlidingWindow(window=1),
    SlidingWindow(window=5),
    Strided(stride=3),
    Strided(stride=4, anchor="absolute"),
    Longformer(window=4, global_tokens=(0, 7, 13)),
    StreamingLLM(sinks=2, window=3),
    SlidingWindow(window=5) | Strided(stride=3),
    Strided(stride=3) | Strided(stride=4),
    Strided(stride=6) | Strided(stride=3),
    StreamingLLM(sinks=2, window=3) | Longformer(window=7, global_tokens=(1, 5, 9)),
    Strided(stride=4, anchor="absolute") | Longformer(window=2, global_tokens=(3, 8)),
    Longformer(window=2, global_tokens=(3, 8)) | Strided(stride=3),
    Strided(stride=8, anchor="absolute") | Strided(stride=4, anchor="absolute") | Strided(stride=5),
]
CONSTRAINTS = [
    Constraint(),
    Constraint(causal=False),
    Constraint(window=6),
    Constraint(causal=False, window=4),
    Constraint(chunk=5),
]


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_plan_holds_each_allowed_pair_once(pattern, constraint):
    for q_len, k_len, first in [
        (1, 1, 0),
        (17, 17, 0),
        (20, 20, 0),
        (1, 19, 0),
        (5, 23, 0),
        (7, 7, 3),
        (3, 20, 11),
    ]:
        check(pattern, constraint, q_len, k_len, first)


positive = st.integers(1, 12)
simple = st.one_of(
    st.builds(SlidingWindow, window=positive),
    st.builds(Strided, stride=positive, anchor=st.sampled_from(["relative", "absolute"])),
    st.builds(Longformer, window=positive, global_tokens=st.lists(st.integers(0, 30), max_size=4).map(tuple)),
    st.builds(StreamingLLM, sinks=st.integers(0, 5), window=positive),
    st.just(Full()),
)


@settings(max_examples=150, deadline=None)
@given(
    members=st.lists(simple, min_size=1, max_size=3),
    causal=st.booleans(),
    window=st.none() | positive,
    q_len=st.integers(1, 20),
    behind=st.integers(0, 20),
    first=st.integers(0, 9),
)
def test_plan_of_any_union(members, causal, window, q_len, behind, first):
    pattern = members[0]
    for member in members[1:]:
        pattern = pattern | member
    check(pattern, Constraint(causal, window), q_len, q_len + behind, first)


@pytest.mark.parametrize(
    ("pattern", "causal", "pieces"),
    [
        (Full(), True, 1),
        (SlidingWindow(window=5), True, 1),
        (SlidingWindow(window=5), False, 1),
        (Strided(stride=3), True, 1),
        (Strided(stride=3, anchor="absolute"), True, 2),
        (Strided(stride=3, anchor="absolute"), False, 3),
        (StreamingLLM(sinks=2, window=5), True, 2),
        (Longformer(window=5, global_tokens=(0, 20, 31)), True, 2),
        (Longformer(window=5, global_tokens=(0, 20, 31)), False, 4),
    ],
    ids=str,
)
def test_a_pattern_is_a_handful_of_pieces(pattern, causal, pieces):
    plan = make_plan(pattern, Constraint(causal), 50, 50, heads=1)
    assert plan.n_pieces == pieces and not any(group.tiles for group in plan.groups)


class EveryOtherHead(Pattern):
    """A user's own pattern: the predicate alone, different for odd heads."""

    def allows(self, context, head, query, key):
        return (query - key < 3) | ((head % 2 == 1) & (key % 7 == 0))


@pytest.mark.parametrize("causal", [True, False])
def test_a_bare_predicate_is_planned_as_tiles(causal):
    plan = check(EveryOtherHead(), Constraint(causal), 150, 150, heads=3)
    assert not plan.groups[0].pieces and plan.n_pieces == 1
    check(EveryOtherHead(), Constraint(causal), 4, 131, heads=3)


class LowLayersNear(Pattern):
    @property
    def per_layer(self):
        return True

    def allows(self, context, head, query, key):
        return query - key < 2 + context.layer


def test_a_predicate_is_planned_once_unless_it_looks_at_the_layer():
    plans = [make_plan(EveryOtherHead(), Constraint(), 90, 90, heads=2, layer=layer) for layer in range(40)]
    assert all(plan is plans[0] for plan in plans)
    assert make_plan(LowLayersNear(), Constraint(), 90, 90, heads=2, layer=0).pairs == 2 * 90 - 1
    assert make_plan(LowLayersNear(), Constraint(), 90, 90, heads=2, layer=3).pairs == 5 * 90 - 10
    assert (LowLayersNear() | SlidingWindow()).per_layer and not (SlidingWindow() | Full()).per_layer


def test_layers_share_a_plan_and_a_million_tokens_stay_small():
    a = make_plan(SlidingWindow(window=512), Constraint(), 2**20, 2**20, heads=8, layer=0)
    assert a is make_plan(SlidingWindow(window=512), Constraint(), 2**20, 2**20, heads=8, layer=7)
    assert a.pairs == 512 * 2**20 - 512 * 511 // 2
    assert sum(sys.getsizeof(piece) for piece in a.groups[0].pieces) < 1000


@pytest.mark.parametrize(
    ("n", "dense", "window"), [(512, 131_328, 57_408), (1024, 524_800, 122_944), (4096, 8_390_656, 516_160)]
)
def test_cost_counts_causal_pairs(n, dense, window):
    got = cost(SlidingWindow(window=128), n, heads=4, kv_heads=2, head_dim=16, dtype_bytes=2)
    assert (got.dense_pairs, got.pairs) == (dense, window)
    assert got.density == window / dense and got.limit == dense / window
    assert got.flops == 4 * 16 * 4 * window
    assert got.kv_bytes_per_step == 2 * 16 * 2 * 2 * 128


def test_keys_that_heads_of_a_key_head_share_are_read_once():
    full, near = Full(), SlidingWindow(window=10)
    for pattern, keys in [
        (PerHead((near, near, full, full)), 10 + 100),
        (PerHead((near, full, near, full)), 100 + 100),  # the window lies within what the other head reads
        (PerHead((near, Strided(stride=7), near, near)), (10 + 15 - 2) + 10),
    ]:
        step = cost(pattern, 100, heads=4, kv_heads=2, head_dim=8, dtype_bytes=2)
        assert step.kv_bytes_per_step == 2 * 8 * 2 * keys, pattern


def test_cost_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match=re.escape("needs a length of at least 1 token, got 0")):
        cost(Full(), 0)


def slots(segments):
    return [
        (entry.rows, entry.slots if isinstance(entry.slots, slice) else entry.slots.tolist(), entry.first)
        for entry in segments.entries
    ]


def test_segments_of_padding_holes_packing_and_dropped_tokens():
    mask = torch.tensor(
        [[0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    ).bool()
    assert slots(Segments.from_mask(mask)) == [
        (slice(0, 2), slice(2, 5), 0),
        (slice(2, 3), slice(0, 4), 0),
        (slice(3, 4), [0, 3, 4], 0),
    ]
    assert slots(Segments.from_mask(mask[:2], torch.tensor([4, 6])))[1] == (slice(1, 2), slice(2, 5), 6)
    packed = Segments.from_labels(torch.tensor([[0, 0, 1, 1, 1, -1]]))
    assert slots(packed) == [(slice(0, 1), slice(0, 2), 0), (slice(0, 1), slice(2, 5), 0)]
    assert Segments.whole(3, 7).is_whole and not packed.is_whole
    assert Segments.from_mask(torch.ones(3, 7, dtype=torch.bool)).is_whole


def test_queries_of_a_segment_are_its_last_slots():
    left, holes = Segments.from_mask(torch.tensor([[0, 1, 1, 1, 1], [1, 0, 1, 0, 1]]).bool()).entries
    assert left.queries(2, 5) == slice(0, 2) and left.queries(5, 5) == slice(1, 5)
    assert holes.queries(3, 5).tolist() == [0, 2]
