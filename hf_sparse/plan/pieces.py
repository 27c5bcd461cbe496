"""Pieces: interval lists over ordered lists of indices, ready to run.

A piece holds an increasing list of queries and an increasing list of keys; query number t of the piece sees exactly
``keys[lo(t):hi(t)]``. A family is `repeat` equal pieces, each shifted by one index from the one before (the residues
of a stride). Indices count from the first query and the first key of the call; positions are places in the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np

from ..patterns.parts import Bound, Every, Listed, Periodic, Residue
from .intervals import Interval, contradict


@dataclass(frozen=True)
class Lattice:
    """The indices first, first + step, ... , `count` of them."""

    first: int
    count: int
    step: int = 1

    def at(self, t: np.ndarray) -> np.ndarray:
        return self.first + self.step * t

    def count_below(self, index: np.ndarray) -> np.ndarray:
        """Return how many indices of the list are smaller than `index`."""
        if self.step == 1:
            return np.clip(index - self.first, 0, self.count)
        return np.clip(-((self.first - index) // self.step), 0, self.count)


@dataclass(frozen=True)
class Comb:
    """Every `period` indices the same `width` neighbours: indices ``p >= 0`` with ``(p - offset) % period < width``.

    count: how many of them there are in the call.
    """

    offset: int
    period: int
    width: int
    count: int

    @property
    def _start(self) -> int:
        """Index, 0 or negative, at which the period that holds index 0 begins, its neighbours first."""
        return -(-self.offset % self.period)

    @property
    def _before(self) -> int:
        """How many neighbours of that period lie before index 0."""
        return min(-self._start, self.width)

    def at(self, t: np.ndarray) -> np.ndarray:
        period, place = np.divmod(t + self._before, self.width)
        return self._start + period * self.period + place

    def count_below(self, index: np.ndarray) -> np.ndarray:
        period, place = np.divmod(index - self._start, self.period)
        return np.clip(period * self.width + np.minimum(place, self.width) - self._before, 0, self.count)


@dataclass(frozen=True, eq=False)
class IndexList:
    """An explicit increasing list of indices [count]."""

    indices: np.ndarray

    @property
    def count(self) -> int:
        return len(self.indices)

    def at(self, t: np.ndarray) -> np.ndarray:
        return self.indices[t]

    def count_below(self, index: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.indices, index)


Indices = Lattice | Comb | IndexList
_ROWS = 2**15  # queries, of all members, whose bounds are taken at a time where only their sum is wanted
_PROBES = 2**8  # queries at which is looked first, where only is wanted whether there is any pair


@dataclass(frozen=True, eq=False)
class Piece:
    """``queries[t]`` sees ``keys[lo(t):hi(t)]``; see the module.

    query_position, key_position: position of query index 0, and of key index 0 (also where the call holds another key
        there; 0 for keys that know their positions, `hf_sparse.plan.columns.ColumnList`).
    repeat: members of the family; member m shifts every query and key index by m.
    skip: positions of queries that this piece leaves out; `bounds` of a single piece says so itself (lo = hi), that
        of a family, whose members share their bounds, does not.
    """

    queries: Indices
    keys: Indices
    starts: tuple[Bound, ...]
    stops: tuple[Bound, ...]
    query_position: int
    key_position: int
    repeat: int = 1
    skip: tuple[Listed | Periodic, ...] = ()

    def bounds(self, first: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return lo and hi, int64, of the piece's queries number `first` up to `stop`."""
        t = np.arange(first, self.queries.count if stop is None else stop)
        position = self.query_position + self.queries.at(t)
        lo, hi = self._bounds(position)
        hi = np.maximum(hi, lo)
        if self.skip and self.repeat == 1:
            hi = np.where(self._skipped(position), lo, hi)
        return lo, hi

    def _bounds(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return lo and hi at these query positions, never decreasing; hi is below lo where there are no keys."""
        lo, hi = np.zeros_like(position), np.full_like(position, self.keys.count)
        for bound in self.starts:
            lo = np.maximum(lo, self.keys.count_below(bound.at(position) - self.key_position))
        for bound in self.stops:
            hi = np.minimum(hi, self.keys.count_below(bound.at(position) - self.key_position))
        return lo, hi

    def _skipped(self, position: np.ndarray) -> np.ndarray:
        """Tell which of the query positions the piece leaves out."""
        skipped = np.zeros(position.shape, dtype=bool)
        for chosen in self.skip:
            if isinstance(chosen, Listed):
                skipped |= np.isin(position, chosen.positions)
            else:
                skipped |= (position - chosen.offset) % chosen.period < chosen.width
        return skipped

    @cached_property
    def pairs(self) -> int:
        """The (query, key) pairs of the whole family."""
        return sum(int(held.sum()) for held in self._held())

    @cached_property
    def holds_pairs(self) -> bool:
        """True where the piece holds any pair."""
        if not self.queries.count or not self.keys.count:
            return False
        last = self.queries.count - 1
        t = np.unique(np.linspace(0, last, min(self.queries.count, _PROBES)).astype(np.int64))
        lo, hi = self._bounds(self.query_position + self.queries.at(t))
        if not self.skip and (hi > lo).any():
            return True
        # Between two probes nothing lies where lo is already as far at the first as hi is at the second.
        if hi[0] <= lo[0] and (hi[1:] <= lo[:-1]).all():
            return False
        return any(bool(held.any()) for held in self._held())

    def _held(self) -> Iterator[np.ndarray]:
        """Yield how many pairs each query number has in all members together, int64, some queries at a time."""
        rows = max(1, _ROWS // self.repeat)
        for first in range(0, self.queries.count, rows):
            stop = min(first + rows, self.queries.count)
            lo, hi = self.bounds(first, stop)
            members: int | np.ndarray = self.repeat
            if self.skip and self.repeat > 1:
                position = self.query_position + self.queries.at(np.arange(first, stop))
                of_all = position[:, None] + np.arange(self.repeat)
                members = self.repeat - self._skipped(of_all).sum(1)
            yield (hi - lo) * members


def pieces_of(interval: Interval, q_len: int, k_len: int, first: int) -> list[Piece] | None:
    """Return the interval's pieces for keys at positions first .. first + k_len and queries at the last q_len of them.

    None where the interval has no pieces of this form (a residue list whose members differ).
    """
    behind = k_len - q_len
    if contradict(interval):
        return []

    def piece(queries: Indices, keys: Indices, repeat: int = 1) -> Piece:
        starts, stops = interval.starts, interval.stops
        return Piece(queries, keys, starts, stops, first + behind, first, repeat, interval.skip)

    queries = indices_of(interval.queries, first + behind, q_len)
    keys = interval.keys
    if isinstance(keys, (Every, Listed, Periodic)):
        return [piece(queries, indices_of(None if isinstance(keys, Every) else keys, first, k_len))]
    assert isinstance(keys, Residue) and interval.queries is None
    # The members of a family must be alike. Constant distances are; a fixed position divides them in two.
    cuts = set()
    for bound in (*interval.starts, *interval.stops):
        if bound.mul == 0:
            cuts.add(bound.const - first)
        elif bound.div != 1 or bound.mul != 1:
            return None
    return [
        piece(Lattice(q, n_q, keys.stride), Lattice(k, n_k, keys.stride), repeat)
        for q, k, n_q, n_k, repeat in _residue_families(keys.stride, q_len, k_len, cuts)
    ]


def indices_of(positions: Listed | Periodic | None, first: int, length: int) -> Indices:
    """Return the indices, counted from position `first`, of the listed positions among the next `length`."""
    if positions is None:
        return Lattice(0, length)
    if isinstance(positions, Listed):
        return _listed(positions, first, length)
    offset = (positions.offset - first) % positions.period
    if positions.width == 1:
        return Lattice(offset, len(range(offset, length, positions.period)), positions.period)
    whole = Comb(offset, positions.period, positions.width, 2**62)
    return Comb(offset, positions.period, positions.width, int(whole.count_below(np.array(length))))


@lru_cache(maxsize=64)  # the pieces of a plan share their lists
def _listed(positions: Listed, first: int, length: int) -> IndexList:
    indices = np.array(positions.positions, dtype=np.int64) - first
    return IndexList(indices[(indices >= 0) & (indices < length)])


def _residue_families(
    stride: int, q_len: int, k_len: int, cuts: set[int]
) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (first query, first key, queries, keys, members) of runs of residues with equal counts.

    cuts: key indices; residues on either side of one have different numbers of keys below it.
    """
    behind = k_len - q_len
    # Residues differ where the first query wraps around, and where queries, keys or keys below a cut end.
    edges = {0, min(stride, k_len), behind % stride, k_len % stride}
    edges |= {cut % stride for cut in cuts}
    ordered = sorted(e for e in edges if 0 <= e <= min(stride, k_len))
    for k, stop in pairwise(ordered):
        q = (k - behind) % stride
        n_q, n_k = len(range(q, q_len, stride)), len(range(k, k_len, stride))
        if n_q:
            yield q, k, n_q, n_k, stop - k
