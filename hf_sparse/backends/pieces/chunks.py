"""From the bounds of pieces to runs: which chunks of rows have the same shape, at the same distance from each other."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ...plan.pieces import Lattice, Piece
from .runs import Mask, Run, Span

# A span is widened to a multiple of this many keys (the rest masked): the matrix kernels are faster on such widths.
_ALIGN = 32
# Pieces whose keys are at most so many in all are read whole by every chunk (sinks, global tokens).
_CONSTANT = 256

Bounds = tuple[np.ndarray, np.ndarray]


def runs_of(pieces: list[Piece], chunk_rows: int, fused: bool) -> tuple[Run, ...]:
    """Return the runs that compute `pieces`, which share their queries; arguments as in `make_schedule`."""
    count = pieces[0].queries.count
    bounds = [piece.bounds() for piece in pieces]
    runs: list[Run] = []
    row = 0
    if fused:
        nothing, row = _whole_rows(pieces, bounds, count, chunk_rows)
        if row > nothing > 0:
            runs.append(Run(0, nothing, (), empty=np.ones((1, nothing), dtype=bool)))
        if row > nothing:
            runs.append(_whole_run(bounds, nothing, row))
        else:
            row = 0
    if row < count:
        runs += _Chunks(pieces, bounds, count, chunk_rows).runs(row)
    return tuple(runs)


def _whole_rows(pieces: list[Piece], bounds: list[Bounds], count: int, chunk_rows: int) -> tuple[int, int]:
    """Return the rows that one piece alone serves as unmasked keys, a causal triangle, or both in a row.

    They begin after the leading rows that see nothing, and are none where that is not worth a call of its own, or the
    piece's lists are no slices, which the fused operator could read in place.
    """
    if not isinstance(pieces[0].queries, Lattice):
        return 0, 0
    sees = np.zeros(count, dtype=bool)
    for lo, hi in bounds:
        sees |= hi > lo
    if not sees.any():
        return 0, 0
    nothing = int(np.argmax(sees))
    best = 0
    for number, (lo, hi) in enumerate(bounds):
        if not isinstance(pieces[number].keys, Lattice):
            continue
        lo, hi = lo[nothing:], hi[nothing:]
        others = np.zeros(count - nothing, dtype=bool)
        for other, (other_lo, other_hi) in enumerate(bounds):
            if other != number:
                others |= (other_hi > other_lo)[nothing:]
        growth = hi - hi[0]
        for wanted in (np.zeros(count - nothing, dtype=np.int64), np.arange(count - nothing)):
            fits = (lo == lo[0]) & (growth == wanted) & (hi > lo) & ~others
            best = max(best, len(fits) if fits.all() else int(np.argmin(fits)))
    return (nothing, nothing + best) if best >= min(2 * chunk_rows, count - nothing) else (0, 0)


def _whole_run(bounds: list[Bounds], row: int, stop: int) -> Run:
    number = next(n for n, (lo, hi) in enumerate(bounds) if hi[row] > lo[row])
    lo, hi = bounds[number]
    rows, first, end = stop - row, int(lo[row]), int(hi[row])
    if rows == 1 or hi[stop - 1] == hi[row]:
        return Run(row, rows, (Span(number, first, end - first),))
    spans: tuple[Span, ...] = (Span(number, end - 1, rows, causal=True),)
    if end - 1 > first:
        spans = (Span(number, first, end - 1 - first), *spans)
    return Run(row, rows, spans)


@dataclass
class _Shape:
    """What one piece gives the chunks of a phase: chunk b reads keys first[b] .. first[b] + width[b].

    lo, hi: [chunks, rows], relative to `first`; a row without keys has 0, 0.
    """

    first: np.ndarray
    width: np.ndarray
    lo: np.ndarray
    hi: np.ndarray

    @staticmethod
    def of(lo: np.ndarray, hi: np.ndarray) -> _Shape:
        some = hi > lo
        first = np.where(some, lo, np.iinfo(np.int64).max).min(1)
        end = np.where(some, hi, -1).max(1)
        first = np.where(end < 0, 0, first)
        relative = [np.where(some, x - first[:, None], 0) for x in (lo, hi)]
        return _Shape(first, np.maximum(end - first, 0), *relative)

    def like_previous(self) -> np.ndarray:
        """Tell for each chunk but the first whether it has the shape of the one before."""
        same = (self.lo[1:] == self.lo[:-1]).all(1) & (self.hi[1:] == self.hi[:-1]).all(1)
        return same & (self.width[1:] == self.width[:-1])


class _Chunks:
    """Cuts rows into chunks and joins them to runs."""

    def __init__(self, pieces: list[Piece], bounds: list[Bounds], count: int, chunk_rows: int) -> None:
        self.pieces, self.bounds, self.count, self.rows = pieces, bounds, count, chunk_rows
        self.constants: dict[int, tuple[int, int]] = {}
        for number, (lo, hi) in enumerate(bounds):
            some = hi > lo
            if some.any():
                first, end = int(lo[some].min()), int(hi[some].max())
                if end - first <= min(_CONSTANT, int(some.sum()) // 2):
                    self.constants[number] = first, end
        self.masks: dict[bytes, Mask] = {}
        self.period, self.edge = _period(pieces, chunk_rows)

    def runs(self, row: int) -> list[Run]:
        """Return the runs of the rows from `row` on: up to the first edge, whole periods, and the rest."""
        edge = row if self.edge is None else row + (self.edge - row) % self.period
        runs = []
        if edge >= self.count:
            return self._blocks(row, self.count - row, 1)
        if edge > row:
            runs += self._blocks(row, edge - row, 1)
        whole = (self.count - edge) // self.period
        if whole:
            runs += self._blocks(edge, self.period, whole)
        if (rest := edge + whole * self.period) < self.count:
            runs += self._blocks(rest, self.count - rest, 1)
        return runs

    def _blocks(self, row: int, period: int, blocks: int) -> list[Run]:
        """Return the runs of `blocks` blocks of `period` rows."""
        runs = []
        for start in range(0, period, self.rows):
            stop = min(start + self.rows, period)
            places = row + np.arange(blocks)[:, None] * period + np.arange(start, stop)
            shapes = {
                number: _Shape.of(lo[places], hi[places])
                for number, (lo, hi) in enumerate(self.bounds)
                if number not in self.constants
            }
            for first, end in _regular(list(shapes.values()), blocks):
                runs.append(self._run(row + start + first * period, stop - start, period, first, end, shapes))
        return runs

    def _run(self, row: int, rows: int, step: int, first: int, end: int, shapes: dict[int, _Shape]) -> Run:
        spans = []
        repeat = end - first
        places = row + np.arange(repeat)[:, None] * step + np.arange(rows)
        seen = np.zeros((repeat, rows), dtype=bool)
        for number, (least, most) in self.constants.items():
            lo, hi = (x[places] for x in self.bounds[number])
            some = hi > lo
            if some.any():
                seen |= some
                lo, hi = np.where(some, lo - least, 0), np.where(some, hi - least, 0)
                whole = (lo == 0).all() and (hi == most - least).all()
                spans.append(Span(number, least, most - least, mask=None if whole else Mask(lo, hi)))
        for number, shape in shapes.items():
            width = int(shape.width[first])
            if width:
                seen |= (shape.hi[first] > shape.lo[first])[None]
                spans.append(self._span(number, shape, first, end, width))
        return Run(row, rows, tuple(spans), repeat, step, empty=None if seen.all() else ~seen)

    def _span(self, number: int, shape: _Shape, first: int, end: int, width: int) -> Span:
        lo, hi, start = shape.lo[first], shape.hi[first], int(shape.first[first])
        step = int(shape.first[first + 1]) - start if end - first > 1 else 0
        if (lo == 0).all() and (hi == width).all():
            return Span(number, start, width, step)
        more = min(-width % _ALIGN, start)
        lo, hi = np.where(hi > lo, lo + more, 0), np.where(hi > lo, hi + more, 0)
        mask = self.masks.setdefault(lo.tobytes() + hi.tobytes(), Mask(lo, hi))
        return Span(number, start - more, width + more, step, mask)


def _period(pieces: list[Piece], chunk_rows: int) -> tuple[int, int | None]:
    """Return after how many rows the bounds of blocks repeat, at least about `chunk_rows`, and a row where one begins.

    The row is None where no bound goes by blocks.
    """
    period, edge = 1, None
    for piece in pieces:
        step = getattr(piece.queries, "step", 1)
        for bound in (*piece.starts, *piece.stops):
            if bound.div > 1 and bound.div % step == 0 and math.lcm(period, bound.div // step) <= 2**20:
                first = piece.query_position + int(piece.queries.at(np.zeros(1, dtype=np.int64))[0])
                period = math.lcm(period, bound.div // step)
                edge = -(-(-(bound.add + first) % bound.div) // step)
    return (period if period >= chunk_rows else period * (chunk_rows // period)), edge


def _regular(shapes: list[_Shape], blocks: int) -> list[tuple[int, int]]:
    """Return the ranges of chunks that have one shape, at constant distances."""
    same = np.ones(blocks - 1, dtype=bool)
    changes = np.zeros(blocks - 1, dtype=bool)
    for shape in shapes:
        same &= shape.like_previous()
        distance = np.diff(shape.first)
        changes[1:] |= distance[1:] != distance[:-1]
    ranges, first = [], 0
    for number in (np.flatnonzero(~same | changes) + 1).tolist():
        # The first two chunks of a run set its distance; a change counts from the third on.
        if not same[number - 1] or number - first > 1:
            ranges.append((first, number))
            first = number
    return [*ranges, (first, blocks)]
