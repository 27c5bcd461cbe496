"""Lists of indices in closed form give what writing them out gives."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse.patterns.parts import Bound, Every, Listed, Periodic
from hf_sparse.plan.intervals import Interval
from hf_sparse.plan.pieces import Comb, IndexList, Lattice, Piece, indices_of, pieces_of

small = st.integers(0, 12)


def same(indices, written):
    """Assert that a list holds these indices, and counts them below any index."""
    assert indices.count == len(written)
    assert indices.at(np.arange(indices.count)).tolist() == written
    asked = np.arange(-15, 60)
    below = [sum(index < limit for index in written) for limit in asked.tolist()]
    assert indices.count_below(asked).tolist() == below


@given(first=small, count=small, step=st.integers(1, 7))
def test_lattice(first, count, step):
    same(Lattice(first, count, step), [first + step * t for t in range(count)])


@given(indices=st.sets(small))
def test_index_list(indices):
    same(IndexList(np.array(sorted(indices), dtype=np.int64)), sorted(indices))


@given(
    period=st.integers(1, 9), offset=st.integers(-9, 20), width=st.integers(1, 9), first=small, length=small
)
def test_periodic_positions_of_a_call(period, offset, width, first, length):
    width = min(width, period)
    written = [i for i in range(length) if (i + first - offset) % period < width]
    found = indices_of(Periodic(period, offset, width), first, length)
    assert isinstance(found, Lattice if width == 1 else Comb)
    same(found, written)


@given(positions=st.sets(small), first=small, length=small)
def test_listed_positions_of_a_call(positions, first, length):
    found = indices_of(Listed(tuple(sorted(positions))), first, length)
    same(found, sorted(p - first for p in positions if first <= p < first + length))


bounds = st.builds(
    Bound, const=st.integers(-9, 9), mul=st.integers(0, 3), add=st.integers(0, 5), div=st.integers(1, 4)
)


@given(bound=bounds, query=small)
def test_a_bound_never_decreases(bound, query):
    here, next_one = bound.at(np.array([query, query + 1]))
    assert here == bound.mul * ((query + bound.add) // bound.div) + bound.const <= next_one


@given(starts=st.lists(bounds, max_size=2), stops=st.lists(bounds, max_size=2), n=st.integers(1, 30))
def test_bounds_that_contradict_each_other_hold_nothing(starts, stops, n):
    interval = Interval(Every(), tuple(starts), tuple(stops))
    whole = Piece(Lattice(0, n), Lattice(0, n), tuple(starts), tuple(stops), 0, 0)
    found = pieces_of(interval, n, n, 0)
    assert sum(piece.pairs for piece in found) == whole.pairs
    assert whole.holds_pairs == (whole.pairs > 0)


@pytest.mark.parametrize("repeat", [1, 3])
def test_pairs_are_counted_however_many_are_taken_at_a_time(monkeypatch, repeat):
    skip = (Listed((4, 5, 90)), Periodic(7, 2, 2))
    piece = Piece(
        Lattice(0, 60, repeat), Lattice(0, 60, repeat), (Bound(-9),), (Bound(1),), 0, 0, repeat, skip
    )
    counted = []
    for rows in (1, 5, 2**15):
        monkeypatch.setattr("hf_sparse.plan.pieces._ROWS", rows)
        counted.append(replace(piece).pairs)
    lo, hi = piece.bounds()
    position = repeat * np.arange(60)[:, None] + np.arange(repeat)
    skipped = np.isin(position, (4, 5, 90)) | ((position - 2) % 7 < 2)
    assert set(counted) == {int(((hi - lo)[:, None] * ~skipped).sum())}
