"""Which FlexAttention calls a plan becomes: an order of queries, an order of keys, and intervals between them.

Every call sees its keys as one axis. Pieces over the queries as they stand share a call, whose keys are the sequence
itself and, behind it, the keys that lie far apart (global tokens, summary columns), gathered next to each other. The
residues of a stride are a call of their own, queries and keys sorted by residue: each residue is then a stretch of
plain window or causal attention. Chosen queries that see everything are gathered, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ...patterns.parts import Bound
from ...plan.pieces import Indices, Lattice, Piece
from ...plan.plan import HeadPlan, Plan
from ...plan.tiles import Tiles

BLOCK = 128  # rows and keys per block of FlexAttention's own masks


@dataclass(frozen=True)
class Reads:
    """Each query sees the keys of list number `keys` from max(starts) up to, not including, min(stops)."""

    keys: int
    starts: tuple[Bound, ...]
    stops: tuple[Bound, ...]


@dataclass(frozen=True, eq=False)
class Order:
    """One call.

    queries: query indices [n] in the order of the rows, None for all as they stand.
    stride: more than 1 where queries and keys are sorted by their residue modulo it; then `lists` is empty.
    lists: the key lists; list 0 may be the sequence itself.
    places: where each list begins on the call's key axis, a multiple of BLOCK.
    reads: what each row sees, disjoint.
    tiles: tile lists, over queries and keys as they stand.
    q_len, k_len, key_position: queries and keys of the sequence, and the position of its first key.
    """

    queries: np.ndarray | None
    stride: int
    lists: tuple[Indices, ...]
    places: tuple[int, ...]
    reads: tuple[Reads, ...]
    tiles: tuple[Tiles, ...]
    q_len: int
    k_len: int
    key_position: int

    @property
    def rows(self) -> int:
        return self.q_len if self.queries is None else len(self.queries)

    @property
    def keys(self) -> int:
        """Length of the key axis, gaps included."""
        if self.stride > 1:
            return self.k_len
        return self.places[-1] + self.lists[-1].count


@dataclass(frozen=True, eq=False)
class GroupOrders:
    """The calls of one group of heads.

    merged: calls whose results are merged by log-sum-exp.
    placed: calls over chosen queries; their rows replace what `merged` gave there.
    """

    merged: tuple[Order, ...]
    placed: tuple[Order, ...]


@lru_cache(maxsize=256)
def orders_of(plan: Plan, group: HeadPlan, selected: bool = False) -> GroupOrders:
    """Return the calls that compute a group of heads.

    selected: blocks are read besides that were selected by their content, in the first call; it is over queries and
        keys as they stand.
    """
    natural: list[Piece] = []
    by_stride: dict[int, list[Piece]] = {}
    placed: list[Order] = []
    every = Lattice(0, plan.q_len)
    for piece in group.pieces:
        queries, keys = piece.queries, piece.keys
        if piece.repeat == 1 and queries == every:
            natural.append(piece)
        elif isinstance(queries, Lattice) and isinstance(keys, Lattice) and queries.step == keys.step > 1:
            by_stride.setdefault(queries.step, []).append(piece)
        else:
            chosen = queries.at(np.arange(queries.count))
            placed.append(_gathered(plan, [piece], (), chosen, whole_first=False))
    merged = [_sorted(plan, stride, pieces) for stride, pieces in by_stride.items()]
    if natural or group.tiles or selected:
        merged.insert(
            0, _gathered(plan, natural, group.tiles, None, whole_first=bool(group.tiles) or selected)
        )
    return GroupOrders(tuple(merged), tuple(placed))


def _gathered(
    plan: Plan,
    pieces: list[Piece],
    tiles: tuple[Tiles, ...],
    queries: np.ndarray | None,
    *,
    whole_first: bool,
) -> Order:
    whole = Lattice(0, plan.k_len)
    lists: list[Indices] = [whole] if whole_first else []
    numbers: dict[tuple[int, ...], int] = {_key(whole): 0} if whole_first else {}
    # The sequence itself first: it needs no gathering, and tiles speak of it.
    for piece in sorted(pieces, key=lambda piece: not _together(piece.keys)):
        keys = whole if _together(piece.keys) else piece.keys
        if _key(keys) not in numbers:
            numbers[_key(keys)] = len(lists)
            lists.append(keys)
    reads = []
    for piece in pieces:
        starts, stops = piece.starts, piece.stops
        keys = piece.keys
        if keys != whole and _together(keys):
            # A short stretch of the sequence: its ends are bounds like any others.
            first, last = (int(i) + piece.key_position for i in keys.at(np.array([0, keys.count - 1])))
            starts, stops = (*starts, Bound.fixed(first)), (*stops, Bound.fixed(last + 1))
            keys = whole
        reads.append(Reads(numbers[_key(keys)], starts, stops))
    places, end = [], 0
    for keys in lists:
        places.append(end)
        end += -(-keys.count // BLOCK) * BLOCK
    return Order(
        queries, 1, tuple(lists), tuple(places), tuple(reads), tiles, plan.q_len, plan.k_len, plan.first
    )


def _sorted(plan: Plan, stride: int, pieces: list[Piece]) -> Order:
    # The members of a family, and families of the same interval, differ in nothing but their residues.
    reads = dict.fromkeys(Reads(0, piece.starts, piece.stops) for piece in pieces)
    # Beyond the last key every residue has one token, whatever the stride.
    stride = min(stride, max(plan.k_len, 2))
    return Order(None, stride, (), (), tuple(reads), (), plan.q_len, plan.k_len, plan.first)


def _together(keys: Indices) -> bool:
    """True where the list is a stretch of the sequence without gaps."""
    if keys.count <= 1:
        return True
    first, last = keys.at(np.array([0, keys.count - 1]))
    return int(last - first) == keys.count - 1


def _key(keys: Indices) -> tuple[int, ...]:
    if isinstance(keys, Lattice):
        return (keys.first, keys.count, keys.step)
    return tuple(keys.at(np.arange(keys.count)).tolist())
