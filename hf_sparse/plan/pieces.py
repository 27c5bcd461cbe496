"""Pieces: interval lists over ordered lists of indices, ready to run.

A piece holds an increasing list of queries and an increasing list of keys; query number t of the piece sees exactly
``keys[lo(t):hi(t)]``. A family is `repeat` equal pieces, each shifted by one index from the one before (the residues
of a stride). Indices count from the first query and the first key of the call; positions are places in the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..patterns.parts import Bound, Every, Listed, Periodic, Residue
from .intervals import Interval


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
        return np.clip(-((self.first - index) // self.step), 0, self.count)


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


@dataclass(frozen=True, eq=False)
class Piece:
    """``queries[t]`` sees ``keys[lo(t):hi(t)]``; see the module.

    query_position, key_position: position of query index 0 and key index 0.
    repeat: members of the family; member m shifts every query and key index by m.
    skip: positions of queries that this piece leaves out (lo = hi).
    """

    queries: Lattice | IndexList
    keys: Lattice | IndexList
    starts: tuple[Bound, ...]
    stops: tuple[Bound, ...]
    query_position: int
    key_position: int
    repeat: int = 1
    skip: tuple[int, ...] = ()

    def bounds(self, first: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return lo and hi, int64, of the piece's queries number `first` up to `stop`."""
        t = np.arange(first, self.queries.count if stop is None else stop)
        position = self.query_position + self.queries.at(t)
        lo, hi = np.zeros_like(t), np.full_like(t, self.keys.count)
        for bound in self.starts:
            lo = np.maximum(lo, self.keys.count_below(bound.at(position) - self.key_position))
        for bound in self.stops:
            hi = np.minimum(hi, self.keys.count_below(bound.at(position) - self.key_position))
        hi = np.maximum(hi, lo)
        if self.skip:
            hi = np.where(np.isin(position, self.skip), lo, hi)
        return lo, hi

    @property
    def pairs(self) -> int:
        """The (query, key) pairs of the whole family."""
        lo, hi = self.bounds()
        return self.repeat * int((hi - lo).sum())


def pieces_of(interval: Interval, q_len: int, k_len: int, first: int) -> list[Piece] | None:
    """Return the interval's pieces for keys at positions first .. first + k_len and queries at the last q_len of them.

    None where the interval has no pieces of this form (a residue list whose members differ).
    """
    behind = k_len - q_len

    def piece(queries: Lattice | IndexList, keys: Lattice | IndexList, repeat: int = 1) -> Piece:
        starts, stops = interval.starts, interval.stops
        return Piece(queries, keys, starts, stops, first + behind, first, repeat, interval.skip)

    if interval.queries is not None:
        here = np.array(interval.queries) - first - behind
        here = here[(here >= 0) & (here < q_len)]
        queries: Lattice | IndexList = IndexList(here)
    else:
        queries = Lattice(0, q_len)
    keys = interval.keys
    if isinstance(keys, Every):
        return [piece(queries, Lattice(0, k_len))]
    if isinstance(keys, Listed):
        held = np.array(keys.positions, dtype=np.int64) - first
        return [piece(queries, IndexList(held[(held >= 0) & (held < k_len)]))]
    if isinstance(keys, Periodic):
        start = -first % keys.period
        return [piece(queries, Lattice(start, len(range(start, k_len, keys.period)), keys.period))]
    assert isinstance(keys, Residue)
    # The members of a family must be alike: only constant distances are, and no query may be singled out.
    distances = all(b.div == 1 and b.mul == 1 for b in (*interval.starts, *interval.stops))
    if not distances or interval.queries is not None or interval.skip:
        return None
    return [
        piece(Lattice(q, n_q, keys.stride), Lattice(k, n_k, keys.stride), repeat)
        for q, k, n_q, n_k, repeat in _residue_families(keys.stride, q_len, k_len)
    ]


def _residue_families(stride: int, q_len: int, k_len: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (first query, first key, queries, keys, members) of runs of residues with equal counts."""
    behind = k_len - q_len
    run: list[int] | None = None
    for k in range(min(stride, k_len)):
        q = (k - behind) % stride
        n_q, n_k = len(range(q, q_len, stride)), len(range(k, k_len, stride))
        if run is not None and run[2] == n_q and run[3] == n_k and q == run[0] + run[4]:
            run[4] += 1
            continue
        if run is not None and run[2]:
            yield run[0], run[1], run[2], run[3], run[4]
        run = [q, k, n_q, n_k, 1]
    if run is not None and run[2]:
        yield run[0], run[1], run[2], run[3], run[4]
