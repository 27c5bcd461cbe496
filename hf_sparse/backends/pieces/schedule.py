"""The order in which a plan is computed: runs of query rows with the key spans each of them reads.

Rows are cut into chunks whose keys stay in the processor's cache. Chunks of the same shape at a constant distance are
one run, so a schedule stays short however long the sequence is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ...plan.pieces import IndexList, Lattice, Piece
from ...plan.plan import Plan
from ...plan.tiles import Tiles

# A span is widened to a multiple of this many keys (the rest masked): the matrix kernels are faster on such widths.
_ALIGN = 32


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys of a span each row of a chunk may attend to.

    lo, hi: int64 [rows], row t sees keys lo[t]:hi[t] of the span.
    """

    lo: np.ndarray
    hi: np.ndarray

    def allowed(self, width: int, device: torch.device) -> Tensor:
        """Return [rows, width] bool, True = may attend."""
        key = torch.arange(width, device=device)
        lo, hi = (torch.from_numpy(x).to(device)[:, None] for x in (self.lo, self.hi))
        return (key >= lo) & (key < hi)


@dataclass(frozen=True, eq=False)
class Span:
    """Keys that every row of a chunk reads: numbers first .. first + width of the piece's key list.

    step: how many keys further the same span of the run's next chunk begins.
    mask: None when every row sees all of them.
    causal: row t sees the first t + 1 of them (then width = rows, and mask is None).
    """

    piece: int
    first: int
    width: int
    step: int = 0
    mask: Mask | None = None
    causal: bool = False

    def keys(self, number: int) -> slice:
        """Return the span's keys in the run's chunk `number`."""
        first = self.first + number * self.step
        return slice(first, first + self.width)


@dataclass(frozen=True, eq=False)
class Run:
    """`repeat` chunks of `rows` queries, one behind the other.

    empty: [rows] bool, rows that see no key at all; None when there are none.
    """

    row: int
    rows: int
    spans: tuple[Span, ...]
    repeat: int = 1
    empty: np.ndarray | None = None

    @property
    def all_rows(self) -> slice:
        return slice(self.row, self.row + self.rows * self.repeat)

    def chunks(self) -> Iterator[tuple[int, slice]]:
        """Yield the number and the rows of each chunk."""
        for number in range(self.repeat):
            yield number, slice(self.row + number * self.rows, self.row + (number + 1) * self.rows)


@dataclass(frozen=True, eq=False)
class Group:
    """Pieces over one list of queries, and the runs that compute them together.

    queries, repeat: the list, shared by the pieces (see `Piece`).
    keys: the key list of each piece.
    """

    queries: Lattice | IndexList
    repeat: int
    keys: tuple[Lattice | IndexList, ...]
    runs: tuple[Run, ...]


@dataclass(frozen=True, eq=False)
class Schedule:
    """Everything the executor walks through for one plan.

    single: no query row is computed by more than one group, so nothing has to be merged between groups.
    covers: every query row is computed by some group.
    """

    groups: tuple[Group, ...]
    tiles: tuple[Tiles, ...]
    single: bool
    covers: bool


@lru_cache(maxsize=128)
def make_schedule(plan: Plan, chunk_rows: int, fused: bool) -> Schedule:
    """Return the schedule of a plan.

    Args:
        chunk_rows: query rows per chunk.
        fused: a fused operator is there for spans without a mask, so that long unmasked or causal stretches are kept
            whole.
    """
    by_queries: dict[tuple[int, ...], list[Piece]] = {}
    for piece in plan.pieces:
        by_queries.setdefault(_query_key(piece), []).append(piece)
    groups = tuple(_group(pieces, chunk_rows, fused) for pieces in by_queries.values())
    times = np.zeros(plan.q_len, dtype=np.int32)
    for group in groups:
        for member in range(group.repeat):
            times[group.queries.at(np.arange(group.queries.count)) + member] += 1
    for tile in plan.tiles:
        for block, keys in enumerate(tile.key_blocks):
            start, stop = tile.rows(block)
            times[start:stop] += len(keys) > 0
    single = bool(times.max(initial=0) <= 1)
    return Schedule(groups, plan.tiles, single, bool(times.min(initial=1) >= 1))


def _query_key(piece: Piece) -> tuple[int, ...]:
    queries = piece.queries
    if isinstance(queries, Lattice):
        return (queries.first, queries.count, queries.step, piece.repeat)
    return (-1, *queries.indices.tolist())


def _group(pieces: list[Piece], chunk_rows: int, fused: bool) -> Group:
    queries, count = pieces[0].queries, pieces[0].queries.count
    bounds = [piece.bounds() for piece in pieces]
    runs: list[Run] = []
    row = _whole_rows(bounds, count, chunk_rows) if fused else 0
    if row:
        runs.append(_whole_run(bounds, row))
    masks: dict[bytes, Mask] = {}
    while row < count:
        stop = min(row + chunk_rows, count)
        run = _chunk(pieces, bounds, row, stop, masks)
        if runs and (joined := _join(runs[-1], run)) is not None:
            runs[-1] = joined
        else:
            runs.append(run)
        row = stop
    return Group(queries, pieces[0].repeat, tuple(piece.keys for piece in pieces), tuple(runs))


Bounds = list[tuple[np.ndarray, np.ndarray]]


def _whole_rows(bounds: Bounds, count: int, chunk_rows: int) -> int:
    """Return how many leading rows one piece alone serves as unmasked keys, a causal triangle, or both in a row."""
    best = 0
    for number, (lo, hi) in enumerate(bounds):
        others = np.zeros(count, dtype=bool)
        for other, (other_lo, other_hi) in enumerate(bounds):
            if other != number:
                others |= other_hi > other_lo
        growth = hi - hi[0]
        for wanted in (np.zeros(count, dtype=np.int64), np.arange(count)):
            fits = (lo == lo[0]) & (growth == wanted) & (hi > lo) & ~others
            best = max(best, count if fits.all() else int(np.argmin(fits)))
    return best if best >= min(2 * chunk_rows, count) else 0


def _whole_run(bounds: Bounds, rows: int) -> Run:
    number = next(n for n, (lo, hi) in enumerate(bounds) if hi[0] > lo[0])
    lo, hi = bounds[number]
    first, stop = int(lo[0]), int(hi[0])
    if rows == 1 or hi[rows - 1] == hi[0]:
        return Run(0, rows, (Span(number, first, stop - first),))
    spans: tuple[Span, ...] = (Span(number, stop - 1, rows, causal=True),)
    if stop - 1 > first:
        spans = (Span(number, first, stop - 1 - first), *spans)
    return Run(0, rows, spans)


def _chunk(pieces: list[Piece], bounds: Bounds, row: int, stop: int, masks: dict[bytes, Mask]) -> Run:
    spans = []
    seen = np.zeros(stop - row, dtype=bool)
    for number, (lo, hi) in enumerate(bounds):
        lo, hi = lo[row:stop], hi[row:stop]
        some = hi > lo
        if not some.any():
            continue
        seen |= some
        first, end = int(lo[some].min()), int(hi[some].max())
        if (lo == first).all() and (hi == end).all():
            spans.append(Span(number, first, end - first))
            continue
        width = -(-(end - first) // _ALIGN) * _ALIGN
        first = max(0, end - width)
        width = min(width, pieces[number].keys.count - first)
        lo, hi = np.where(some, lo - first, 0), np.where(some, hi - first, 0)
        mask = masks.setdefault(lo.tobytes() + hi.tobytes(), Mask(lo, hi))
        spans.append(Span(number, first, width, mask=mask))
    return Run(row, stop - row, tuple(spans), empty=None if seen.all() else ~seen)


def _join(run: Run, after: Run) -> Run | None:
    """Return one run for both, or None where their shapes or distances differ."""
    if run.rows != after.rows or len(run.spans) != len(after.spans):
        return None
    if run.empty is not None or after.empty is not None or any(span.causal for span in run.spans):
        return None
    spans = []
    for a, b in zip(run.spans, after.spans, strict=True):
        step = b.first - a.first - a.step * (run.repeat - 1)
        if (
            a.piece != b.piece
            or a.width != b.width
            or a.mask is not b.mask
            or (run.repeat > 1 and step != a.step)
        ):
            return None
        spans.append(replace(a, step=step))
    return replace(run, spans=tuple(spans), repeat=run.repeat + 1)
