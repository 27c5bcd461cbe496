"""Plans as bands: the one shape of mask, besides none, that FlashAttention's kernels know.

In a band of n queries and m keys query i sees the keys j with ``i + m - n - left <= j <= i + m - n + right``: the last
query is level with the last key. Windows, causal triangles, sinks and the residues of a stride are bands once the
queries that see nothing and the keys that nobody sees are cut off.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from ...plan.pieces import IndexList, Indices, Lattice, Piece
from ...plan.plan import HeadPlan, Plan

MOST_RECTANGLES = 8  # calls into which a part that is no band may be cut


@dataclass(frozen=True, eq=False)
class Band:
    """One call of the operator; see the module.

    queries, keys, repeat: as in `Piece`.
    left, right: how many keys to each side, -1 for all.
    """

    queries: Indices
    keys: Indices
    repeat: int
    left: int
    right: int


@dataclass(frozen=True, eq=False)
class Bands:
    """The bands of one group of heads.

    merged: bands over disjoint pairs, merged by log-sum-exp.
    placed: bands over chosen queries; their rows replace what `merged` gave there.
    reasons: why the plan is no such thing; then the bands are incomplete.
    """

    merged: tuple[Band, ...]
    placed: tuple[Band, ...]
    reasons: tuple[str, ...]


@lru_cache(maxsize=256)
def bands_of(plan: Plan, group: HeadPlan) -> Bands:
    """Return the bands that compute a group of heads."""
    merged: list[Band] = []
    placed: list[Band] = []
    reasons: dict[str, None] = {}
    if group.tiles:
        reasons["the pattern has blocks at irregular places"] = None
    for piece in group.pieces:
        found = _bands(piece)
        if isinstance(found, str):
            reasons[found] = None
            continue
        queries = piece.queries
        regular = isinstance(queries, Lattice) and (
            queries == Lattice(0, plan.q_len)
            or (isinstance(piece.keys, Lattice) and piece.keys.step == queries.step)
        )
        (merged if regular else placed).extend(found)
    return Bands(tuple(merged), tuple(placed), tuple(reasons))


def _bands(piece: Piece) -> list[Band] | str:
    """Return the bands of a piece, or why it has none."""
    # Left-out queries are chosen ones: what is computed for them here is replaced.
    lo, hi = replace(piece, skip=()).bounds()
    seen = np.flatnonzero(hi > lo)
    if not len(seen):
        return []
    first, last = int(seen[0]), int(seen[-1]) + 1
    band = _band(piece, lo, hi, first, last)
    if band is not None:
        return [band]
    lo, hi = lo[first:last], hi[first:last]
    edges = np.flatnonzero((np.diff(lo) != 0) | (np.diff(hi) != 0)) + 1
    if len(edges) >= MOST_RECTANGLES:
        return f"a part of the pattern is neither a window nor at most {MOST_RECTANGLES} rectangles"
    starts, stops = [0, *edges.tolist()], [*edges.tolist(), last - first]
    return [
        Band(
            _part(piece.queries, first + start, first + stop),
            _part(piece.keys, int(lo[start]), int(hi[start])),
            piece.repeat,
            -1,
            -1,
        )
        for start, stop in zip(starts, stops, strict=True)
        if hi[start] > lo[start]
    ]


def _band(piece: Piece, lo: np.ndarray, hi: np.ndarray, first: int, last: int) -> Band | None:
    """Return rows first .. last as one band, or None."""
    lo, hi = lo[first:last], hi[first:last]
    begin, end = int(lo.min()), int(hi.max())
    lo, hi = lo - begin, hi - begin
    rows, keys = last - first, end - begin
    level = np.arange(rows) + keys - rows
    cut_left, cut_right = lo > 0, hi < keys
    left = int((level - lo)[cut_left][0]) if cut_left.any() else -1
    right = int((hi - 1 - level)[cut_right][0]) if cut_right.any() else -1
    if (cut_left.any() and left < 0) or (cut_right.any() and right < 0):
        return None
    band_lo = np.clip(level - left, 0, keys) if left >= 0 else np.zeros_like(lo)
    band_hi = np.clip(level + right + 1, 0, keys) if right >= 0 else np.full_like(hi, keys)
    empty = hi <= lo
    if not np.array_equal(empty, band_hi <= band_lo):
        return None
    if not (np.array_equal(lo[~empty], band_lo[~empty]) and np.array_equal(hi[~empty], band_hi[~empty])):
        return None
    queries, read = _part(piece.queries, first, last), _part(piece.keys, begin, end)
    return Band(queries, read, piece.repeat, left, right)


def _part(indices: Indices, start: int, stop: int) -> Indices:
    """Return the entries start .. stop of a list."""
    if isinstance(indices, Lattice):
        return Lattice(indices.first + start * indices.step, stop - start, indices.step)
    return IndexList(indices.at(np.arange(start, stop)))
