"""Plans over a cache that has dropped keys: old ones held apart, the columns, and a tail without gaps behind them.

Key indices are slots: column number i is slot i, and token j of the tail is slot c + j for c columns. Positions stay
what they are in the sequence, so a bound means the same whether a key lies in a column or in the tail.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..patterns.parts import Drawn, Listed, Part, Periodic, Residue
from .constraint import Constraint
from .intervals import Interval, is_in
from .pieces import IndexList, Lattice, Piece, indices_of, pieces_of
from .segments import Columns
from .tiles import Predicate


@dataclass(frozen=True, eq=False)
class ColumnList(IndexList):
    """The slots [count] of some columns, and their positions [count], by which bounds are counted."""

    positions: np.ndarray

    def count_below(self, index: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.positions, index)


def check_columns(columns: Columns, constraint: Constraint, q_len: int, k_len: int, first: int) -> None:
    """Raise ValueError where no plan can be made over keys of which these are columns."""
    if not constraint.causal:
        raise ValueError(
            f"a plan over {len(columns)} keys held apart needs a causal constraint, got causal=False; keep every key"
        )
    if q_len > k_len - len(columns):
        raise ValueError(
            f"the last {q_len} keys are queries and cannot be among the {len(columns)} held apart, got {k_len} keys in "
            f"all; keep every query's key in the tail"
        )
    assert columns.positions[0] >= 0 and columns.positions[-1] < first


def check_drawn(parts: Iterable[Part], columns: Columns) -> None:
    """Raise ValueError where blocks are drawn: any of their keys may be wanted again."""
    if any(isinstance(part.keys, Drawn) for part in parts):
        raise ValueError(
            f"drawn blocks cannot be planned over {len(columns)} keys held apart; keep every key in the tail"
        )


def held_pieces(
    interval: Interval, q_len: int, k_len: int, first: int, columns: Columns
) -> list[Piece] | None:
    """Return the interval's pieces, queries being the last `q_len` of `k_len` slots; None as `pieces_of`."""
    early, end = len(columns), first + k_len - len(columns)
    tail = pieces_of(interval, q_len, k_len - early, first)
    if tail is None:
        return None
    pieces = [_behind(piece, early) for piece in tail]
    if not isinstance(interval.keys, Residue):  # a stride that goes along with its query lies in the tail
        pieces.append(_column_piece(interval, q_len, end, columns))
    wanted = pieces_of(interval, q_len, end, 0)
    assert wanted is not None
    held, seen = (sum(piece.pairs for piece in found) for found in (pieces, wanted))
    assert held == seen, "a key that a query may see is not held"
    return pieces


def in_slots(allowed: Predicate, first: int, columns: Columns) -> Predicate:
    """Return `allowed`, which takes positions, as a predicate that takes slots."""
    table = torch.from_numpy(columns.positions)

    def position(slot: Tensor) -> Tensor:
        # Slots outside the call are asked for as well; their answers are not used.
        early = table.to(slot.device)[slot.clamp(0, len(table) - 1)]
        return torch.where(slot < len(table), early, slot + (first - len(table)))

    def of_slots(head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return allowed(head, position(query), position(key))

    return of_slots


def slots_of(positions: range | np.ndarray, first: int, columns: Columns | None) -> list[range | np.ndarray]:
    """Return the slots of ascending positions, all of them held; what is evenly spaced is a range."""
    early = 0 if columns is None else bisect_left(positions, first)
    tail, behind = positions[early:], (0 if columns is None else len(columns)) - first
    slots: list[range | np.ndarray] = []
    if columns is not None and early:
        slots.append(_columns_at(positions[:early], columns))
    if isinstance(tail, range):
        slots.append(range(tail.start + behind, tail.stop + behind, tail.step))
    else:
        slots.append(_spaced(tail + behind))
    return [part for part in slots if len(part)]


def joined(ranges: list[range]) -> list[range]:
    """Return the same slots with ranges that continue one another put together: one view instead of several."""
    whole: list[range] = []
    for part in sorted(ranges, key=lambda part: part.start):
        part = range(part.start, part.start + 1) if len(part) == 1 else part
        if whole and whole[-1].step == part.step == 1 and whole[-1].stop == part.start:
            part = range(whole.pop().start, part.stop)
        whole.append(part)
    return whole


def _columns_at(positions: range | np.ndarray, columns: Columns) -> range | np.ndarray:
    """Return the slots of ascending positions that are all columns."""
    held = columns.positions
    low, high = (int(i) for i in np.searchsorted(held, (positions[0], positions[-1] + 1)))
    if high - low == len(positions):  # nothing lies between them
        assert held[low] == positions[0] and held[high - 1] == positions[-1], "a key to be read is not held"
        return range(low, high)
    if isinstance(positions, range):
        positions = np.arange(positions.start, positions.stop, positions.step)
    slots = np.searchsorted(held, positions)
    assert np.array_equal(held.take(slots, mode="clip"), positions), "a key to be read is not held"
    return _spaced(slots)


def _spaced(slots: np.ndarray) -> range | np.ndarray:
    """Return ascending slots, as a range where they are evenly spaced."""
    if not len(slots):
        return slots
    step = int(slots[1] - slots[0]) if len(slots) > 1 else 1
    return range(int(slots[0]), int(slots[-1]) + 1, step) if (np.diff(slots) == step).all() else slots


def _behind(piece: Piece, early: int) -> Piece:
    """Return a piece over the tail as one over slots, `early` columns before it."""
    keys = piece.keys
    if isinstance(keys, Lattice):
        keys = replace(keys, first=keys.first + early)
    else:
        keys = IndexList(keys.at(np.arange(keys.count)) + early)
    return replace(piece, keys=keys, key_position=piece.key_position - early)


def _column_piece(interval: Interval, q_len: int, end: int, columns: Columns) -> Piece:
    """Return the piece of the columns on the interval's list; queries are at the `q_len` positions before `end`."""
    query_position = end - q_len
    queries = indices_of(interval.queries, query_position, q_len)
    # Bounds never decrease: what they leave of the columns lies between the first query's start and the last's stop.
    least = max((bound.at(query_position) for bound in interval.starts), default=0)
    most = min((bound.at(end - 1) for bound in interval.stops), default=end)
    low, high = np.searchsorted(columns.positions, (least, most))
    reached = columns.positions[low:high]
    slots = np.arange(low, max(low, high))
    if isinstance(interval.keys, (Listed, Periodic)):
        slots = slots[is_in(interval.keys, torch.from_numpy(reached)).numpy()]
    positions = columns.positions[slots]
    keys: Lattice | ColumnList = ColumnList(slots, positions)
    key_position = 0
    if len(slots) and slots[-1] - slots[0] == positions[-1] - positions[0] == len(slots) - 1:
        keys, key_position = Lattice(int(slots[0]), len(slots)), int(positions[0] - slots[0])
    starts, stops = interval.starts, interval.stops
    return Piece(queries, keys, starts, stops, query_position, key_position, skip=interval.skip)
