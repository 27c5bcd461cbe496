"""What planning costs: memory, and how many rows or keys are looked at, for sequences of a million tokens."""

import gc
import sys
import tracemalloc
import weakref

import numpy as np
import pytest

from hf_sparse import (
    BigBird,
    GlobalTokens,
    Longformer,
    PerHead,
    Random,
    SlidingWindow,
    Strided,
    get_pattern,
)
from hf_sparse.patterns import static_patterns
from hf_sparse.plan import Constraint, make_plan
from hf_sparse.plan import plan as planning
from hf_sparse.plan import step as stepping
from hf_sparse.plan.pieces import Piece

N = 1_000_000
DRAWN = ("random", "bigbird")
CLOSED = [name for name in static_patterns() if name not in DRAWN]


def arrays(x, seen=None) -> int:
    """Return the bytes of all arrays that can be reached from a plan, each once."""
    seen = set() if seen is None else seen
    if id(x) in seen:
        return 0
    seen.add(id(x))
    if isinstance(x, np.ndarray):
        return x.nbytes
    if isinstance(x, (tuple, list)):
        return sum(arrays(y, seen) for y in x)
    if type(x).__module__.startswith("hf_sparse.plan"):
        return sum(arrays(y, seen) for y in vars(x).values())
    return 0


def forget_plans():
    caches = planning._plan_parts, planning._plan_step, planning._parts, planning._disjoint
    for cached in (*caches, stepping._disjoint_by_head):
        cached.cache_clear()


@pytest.fixture
def rows_seen(monkeypatch) -> list[int]:
    """The number of queries whose bounds were taken, one entry per request."""
    seen, bounds = [], Piece.bounds

    def counting(self, first=0, stop=None):
        lo, hi = bounds(self, first, stop)
        seen.append(len(lo))
        return lo, hi

    monkeypatch.setattr(Piece, "bounds", counting)
    return seen


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", CLOSED)
def test_a_plan_for_a_million_tokens_is_small(name, causal):
    pattern = get_pattern(name)
    forget_plans()
    tracemalloc.start()
    try:
        plan = make_plan(pattern, Constraint(causal), N, N, heads=8)
        assert plan.groups and plan.n_pieces
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 100_000 and arrays(plan) < 1000
    assert most < 4_000_000  # bidirectional, some pieces are looked at row by row, 2**15 rows at a time


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", CLOSED)
def test_planning_looks_at_few_rows(name, causal, rows_seen):
    forget_plans()
    plan = make_plan(get_pattern(name), Constraint(causal), N, N, heads=8)
    assert rows_seen == []  # nothing before the pieces are asked for
    pieces = sum(len(group.pieces) for group in plan.groups)
    assert 0 < pieces <= 12
    # With skipped queries the pieces that hold something are asked row by row, and show it at once.
    assert sum(rows_seen) <= (0 if causal else 3 * 2**15)


def test_pairs_are_counted_some_rows_at_a_time(rows_seen):
    forget_plans()
    plan = make_plan(SlidingWindow(512), Constraint(), N, N, heads=8)
    assert plan.pairs == 512 * N - 512 * 511 // 2
    assert max(rows_seen) <= 2**15


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("pattern", "per_token"),
    [
        (Random(keys_per_query=16), 8 * 16),
        (Random(blocks=4, block=64), 8 * 4 / 64),
        (BigBird(), 8 * 3 / 64),
        (PerHead((Random(keys_per_query=4),) * 4 + (BigBird(),) * 4), 4 * 4 + 4 * 3 / 64),
    ],
    ids=str,
)
def test_drawn_lists_hold_at_most_8_bytes_per_entry(pattern, per_token, causal):
    for n in (2048, 8192):
        plan = make_plan(pattern, Constraint(causal), n, n, heads=8)
        assert arrays(plan.groups) <= 8 * per_token * n + 1000


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "of", [lambda p: Longformer(64, p), GlobalTokens], ids=["longformer", "global_tokens"]
)
def test_listed_positions_are_held_once(of, causal):
    for count in (1000, 4000):
        plan = make_plan(of(tuple(range(0, 40 * count, 40))), Constraint(causal), N, N, heads=8)
        assert arrays(plan.groups) == 8 * count


@pytest.mark.parametrize("name", static_patterns())
def test_a_step_does_no_work_for_the_keys_it_does_not_read(name, rows_seen):
    """What is traced includes the keys that are read, where they are listed one by one."""
    pattern = get_pattern(name)
    make_plan(pattern, Constraint(), 1, 999, heads=8)
    forget_plans()
    tracemalloc.start()
    try:
        plan = make_plan(pattern, Constraint(), 1, N, heads=8)
        assert plan.reads is not None and plan.n_pieces and plan.pairs
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows_seen == []
    listed = sum(r.listed.nbytes for r in plan.reads if r.listed is not None)
    assert most < 100_000 + 6 * listed
    assert sys.getsizeof(plan.reads) < 1000


def test_a_long_text_leaves_few_lists_of_keys_behind():
    pattern, lists = Strided(stride=3) | Strided(stride=5), []
    for n in range(3000, 3200):
        (reads,) = make_plan(pattern, Constraint(), 1, n, heads=8).reads
        lists.append(weakref.ref(reads.listed))
    del reads
    gc.collect()
    assert sum(kept() is not None for kept in lists) <= 32
