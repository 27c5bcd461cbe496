"""Plans over a cache that has dropped keys: exactly the allowed pairs of what it still holds, each once."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns.definitions import LAYERS, PATTERNS

from hf_sparse import (
    BlockLocal,
    DilatedWindow,
    GlobalTokens,
    Longformer,
    PerHead,
    Random,
    SlidingWindow,
    SparseTransformerFixed,
    StreamingLLM,
    Strided,
)
from hf_sparse.patterns.base import Pattern
from hf_sparse.plan import Columns, Constraint, make_plan
from hf_sparse.plan.columns import ColumnList
from hf_sparse.plan.pieces import Lattice

from .holding import check, times_read
from .keeping import held

positive = st.integers(1, 9)
CONSTRAINTS = st.one_of(
    st.builds(Constraint, window=st.none() | positive),
    st.builds(Constraint, chunk=positive),
    st.builds(Constraint, beyond=positive),
)


def columns_of(*positions) -> Columns:
    return Columns(np.array(positions, dtype=np.int64))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_plan_of_any_pattern_over_what_a_cache_holds(data):
    pattern = data.draw(PATTERNS, label="pattern")
    heads = data.draw(st.integers(1, 6), label="heads")
    try:
        pattern.check_fit(heads, LAYERS)
    except ValueError:
        heads = 3
    q_len = data.draw(st.sampled_from([1, 1, 3, 17]), label="queries")
    n = q_len + data.draw(st.integers(0, 60), label="before them")
    layer = data.draw(st.integers(0, LAYERS - 1), label="layer")
    chosen = tuple(sorted(data.draw(st.sets(st.integers(0, n - 1), max_size=3), label="chosen")))
    lazy = data.draw(st.sampled_from([0, 0, 1, 5, 12]), label="lazy")
    constraint = data.draw(CONSTRAINTS, label="constraint")
    first, columns = held(pattern, n, q_len, constraint, lazy, heads=heads, layer=layer, chosen=chosen)
    k_len = n - first + (0 if columns is None else len(columns))
    check(pattern, constraint, q_len, k_len, first, heads, layer, chosen, columns)


@pytest.mark.parametrize("q_len", [1, 4])
def test_columns_may_continue_in_the_tail(q_len):
    """Where keys that are seen lie on both sides of the cut, the tail has no more to say than the columns."""
    every_key = GlobalTokens((2, 38), global_queries=True) | SlidingWindow(5)
    for pattern in (SlidingWindow(12), StreamingLLM(sinks=3, window=9), Longformer(8, (2, 20)), every_key):
        first, columns = held(pattern, 40, q_len)
        early = () if columns is None else columns.positions
        for cut in range(first + 1, 40 - q_len + 1):
            both = columns_of(*early, *range(first, cut))
            check(pattern, Constraint(), q_len, 40 - cut + len(both), cut, columns=both)


def test_keys_that_nobody_sees_change_nothing():
    pattern = StreamingLLM(sinks=2, window=5) | Strided(8, anchor="absolute")
    for q_len in (1, 6):
        first, columns = held(pattern, 60, q_len)
        more = columns_of(*sorted({*columns.positions.tolist(), 3, 5, 9, 10, 33}))
        check(pattern, Constraint(), q_len, 60 - first + len(more), first, columns=more)


def test_sinks_are_a_slice_and_other_columns_a_list():
    pattern = StreamingLLM(sinks=3, window=6) | GlobalTokens((11, 17))
    first, columns = held(pattern, 50, 5)
    assert columns.positions.tolist() == [0, 1, 2, 11, 17] and first == 40
    (group,) = check(pattern, Constraint(), 5, 15, first, columns=columns).groups
    lists = [piece.keys for piece in group.pieces]
    assert Lattice(0, 3) in lists
    (apart,) = (keys for keys in lists if isinstance(keys, ColumnList))
    assert apart.indices.tolist() == [3, 4] and apart.positions.tolist() == [11, 17]


def test_a_stride_may_pass_over_columns():
    # Queries 38 and 39 look back to position 27, but only at 30, 31, 34 and 35.
    check(DilatedWindow(window=3, dilation=4), Constraint(), 2, 12, 30, columns=columns_of(27, 28))


class Bare(Pattern):
    """A predicate without parts."""

    def allows(self, context, head, query, key):
        return (query - key < 4) | (key % 7 == head)


@pytest.mark.parametrize("q_len", [1, 3, 70])
def test_a_bare_predicate_is_asked_for_positions(q_len):
    first, columns = held(Bare(), 200, q_len, heads=2)
    plan = check(Bare(), Constraint(), q_len, 200 - first + len(columns), first, columns=columns)
    assert plan.pairs < plan.dense_pairs / 2


def test_coprime_strides_are_tiles_of_slots():
    pattern = Strided(3, anchor="absolute") | Strided(5, anchor="absolute") | SlidingWindow(4)
    for q_len in (1, 5, 80):
        first, columns = held(pattern, 300, q_len)
        check(pattern, Constraint(), q_len, 300 - first + len(columns), first, columns=columns)


def step_over_held(pattern, n, lazy=0, heads=1):
    first, columns = held(pattern, n, 1, lazy=lazy, heads=heads)
    return check(pattern, Constraint(), 1, n - first + len(columns), first, heads, columns=columns)


@pytest.mark.parametrize(
    ("pattern", "lazy", "ranges"),
    [
        # Sinks, and the window in the slots behind them.
        (StreamingLLM(sinks=4, window=10), 0, [range(14)]),
        # Keys yet to be dropped between them.
        (StreamingLLM(sinks=4, window=10), 6, [range(4), range(10, 20)]),
        # Positions 7, 15, ... are neighbours; so are two of every eight.
        (SparseTransformerFixed(block=8, summary=1), 0, [range(17)]),
        (SparseTransformerFixed(block=8, summary=2), 0, [range(26)]),
        (GlobalTokens((3, 9, 20)), 0, [range(4)]),
    ],
    ids=str,
)
def test_a_step_reads_slots_that_lie_together_as_one_view(pattern, lazy, ranges):
    (reads,) = step_over_held(pattern, 80, lazy).reads
    assert list(reads.ranges) == ranges and reads.listed is None


def test_a_step_reads_every_second_column_as_a_view():
    pattern = PerHead((Strided(4, anchor="absolute"), Strided(8, anchor="absolute")))
    first, second = step_over_held(pattern, 83, heads=2).reads
    assert first.ranges == (range(22),) and second.ranges == (range(0, 21, 2), range(21, 22))


def test_a_step_gathers_columns_at_irregular_slots():
    pattern = PerHead((Strided(4, anchor="absolute"), GlobalTokens((4, 8, 40))))
    (_, second) = step_over_held(pattern, 83, heads=2).reads
    assert second.listed[0].tolist() == [1, 2, 10]


@pytest.mark.parametrize("summary", [1, 3])
def test_a_step_after_a_million_tokens_is_planned_without_looking_at_them(summary):
    n, block = 2**20 + 5, 64
    pattern = SparseTransformerFixed(block=block, summary=summary) | StreamingLLM(sinks=4, window=100)
    kept = np.arange(n)
    kept = kept[(kept % block >= block - summary) | (kept < 4) | (kept >= n - 100)]
    first = n - 100
    columns = Columns(kept[kept < first])
    assert len(columns) > 16_000 * summary
    tracemalloc.start()
    plan = make_plan(pattern, Constraint(), 1, len(kept), heads=4, first=first, columns=columns)
    pairs = plan.pairs
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    (reads,) = plan.reads
    assert pairs == len(kept) and reads.ranges == (range(len(kept)),) and reads.listed is None
    # At most a few arrays of what is read, and far from a byte per token.
    assert peak < (100_000 if summary == 1 else 8 * 8 * len(columns))
    assert (times_read(plan) == 1).all()


def test_a_chunk_after_a_million_tokens_is_planned_from_closed_forms():
    n, q_len = 2**20, 64
    pattern = StreamingLLM(sinks=4, window=100) | Strided(64, anchor="absolute")
    first = n - q_len - 99
    columns = columns_of(*sorted({0, 1, 2, 3, *range(0, first, 64)}))
    k_len = n - first + len(columns)
    tracemalloc.start()
    plan = make_plan(pattern, Constraint(), q_len, k_len, heads=4, first=first, columns=columns)
    pairs = plan.pairs
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    whole = make_plan(pattern, Constraint(), q_len, n, heads=4)
    assert pairs == whole.pairs and plan.dense_pairs == whole.dense_pairs


def test_layers_that_share_columns_share_a_plan():
    pattern, columns = StreamingLLM(sinks=2, window=5), columns_of(0, 1)
    made = [
        make_plan(pattern, Constraint(), 2, 10, heads=1, layer=layer, first=9, columns=columns)
        for layer in (0, 1)
    ]
    assert made[0] is made[1]
    other = make_plan(pattern, Constraint(), 2, 10, heads=1, first=9, columns=columns_of(0, 1))
    assert other is not made[0]


def test_no_columns_are_like_none():
    empty = Columns(np.empty(0, dtype=np.int64))
    for constraint in (Constraint(), Constraint(causal=False)):
        made = [
            make_plan(SlidingWindow(4), constraint, 3, 9, heads=1, first=5, columns=columns)
            for columns in (None, empty)
        ]
        assert made[0] is made[1]


@pytest.mark.parametrize(
    ("pattern", "constraint", "q_len", "message"),
    [
        (SlidingWindow(3), Constraint(causal=False), 1, "needs a causal constraint, got causal=False"),
        (
            SlidingWindow(3),
            Constraint(),
            9,
            "the last 9 keys are queries and cannot be among the 2 held apart",
        ),
        (Random(keys_per_query=3), Constraint(), 1, "drawn blocks cannot be planned over 2 keys held apart"),
        (Random(keys_per_query=3), Constraint(), 4, "drawn blocks cannot be planned over 2 keys held apart"),
    ],
    ids=str,
)
def test_refused(pattern, constraint, q_len, message):
    with pytest.raises(ValueError, match=message):
        _ = make_plan(pattern, constraint, q_len, 10, heads=1, first=30, columns=columns_of(0, 4)).groups


@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize(
    "pattern",
    [
        SlidingWindow(12),
        StreamingLLM(3, 6),
        Strided(4, anchor="absolute"),
        GlobalTokens((0, 1, 7)),
        BlockLocal(16),
        Strided(5),
    ],
    ids=str,
)
def test_a_key_that_is_wanted_but_not_held_is_never_passed_over(pattern, q_len):
    with pytest.raises(AssertionError, match="not held"):
        _ = make_plan(pattern, Constraint(), q_len, 12, heads=1, first=20, columns=columns_of(0, 1)).groups
