"""The order in which a plan is computed: runs of query rows with the key spans each of them reads.

Rows are cut into chunks whose keys stay in the processor's cache. Chunks of the same shape at constant distances are
one run, so a schedule stays short however long the sequence is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from ...plan.pieces import IndexList, Indices, Lattice, Piece
from ...plan.plan import HeadPlan
from ...plan.tiles import Tiles
from .chunks import runs_of
from .runs import Run

# Measured on two cores, forward, residues of a stride of 128: 31 against 49 ms at 128 tokens each, 87 against 140 ms
# at 256.
MANY_MEMBERS = 16  # members of a family from which on they are computed at once
_SHORT = 512  # tokens of a member


@dataclass(frozen=True, eq=False)
class Group:
    """Pieces over one list of queries, and the runs that compute them together.

    queries, repeat: the list, shared by the pieces (see `Piece`).
    keys: the key list of each piece.
    """

    queries: Indices
    repeat: int
    keys: tuple[Indices, ...]
    runs: tuple[Run, ...]


@dataclass(frozen=True, eq=False)
class Schedule:
    """Everything the executor walks through for the heads of one plan.

    single: no query row is computed by more than one group or tile list: no row needs a log-sum-exp to merge by.
    written: how many of the groups, from the first on, have no row in common: what they give is written, what comes
        after them is merged into it.
    covers: those groups compute every row.
    """

    groups: tuple[Group, ...]
    tiles: tuple[Tiles, ...]
    single: bool
    written: int
    covers: bool


@lru_cache(maxsize=256)
def make_schedule(plan: HeadPlan, q_len: int, chunk_rows: int, fused: bool) -> Schedule:
    """Return the schedule of the heads of a plan over `q_len` queries.

    Args:
        chunk_rows: query rows per chunk.
        fused: a fused operator is there for spans without a mask, so that long unmasked or causal stretches are kept
            whole.
    """
    by_queries: dict[Any, list[Piece]] = {}
    for piece in (member for whole in plan.pieces for member in _members(whole)):
        by_queries.setdefault(_query_key(piece), []).append(piece)
    groups = tuple(
        Group(
            pieces[0].queries,
            pieces[0].repeat,
            tuple(p.keys for p in pieces),
            runs_of(pieces, chunk_rows, fused and not _short_family(pieces[0])),
        )
        for pieces in by_queries.values()
    )
    rows = {id(group): _rows(group, q_len) for group in groups}
    groups = tuple(sorted(groups, key=lambda group: -int(rows[id(group)].sum())))
    times, written, covers = np.zeros(q_len, dtype=np.int32), 0, False
    for number, group in enumerate(groups):
        apart = written == number and not times[rows[id(group)] > 0].any()
        times += rows[id(group)]
        if apart:
            written, covers = number + 1, bool((times == 1).all())
    for tile in plan.tiles:
        for block in np.flatnonzero((tile.lists >= 0).any((0, 2))):
            start, stop = tile.rows(int(block), int(block) + 1)
            times[start:stop] += 1
    return Schedule(groups, plan.tiles, bool(times.max(initial=0) <= 1), written, covers)


def _short_family(piece: Piece) -> bool:
    """True where tiles of all members at once beat the fused operator: many members, each of a few hundred tokens."""
    return piece.repeat >= MANY_MEMBERS and piece.queries.count <= _SHORT


def _rows(group: Group, q_len: int) -> np.ndarray:
    """Return how often the group computes each row, [Q]."""
    times = np.zeros(q_len, dtype=np.int32)
    for member in range(group.repeat):
        times[group.queries.at(np.arange(group.queries.count)) + member] += 1
    return times


def _members(piece: Piece) -> list[Piece]:
    """Return the members of a family that leaves out queries one by one: their bounds differ."""
    if piece.repeat == 1 or not piece.skip:
        return [piece]
    assert isinstance(piece.queries, Lattice) and isinstance(piece.keys, Lattice)
    queries, keys = piece.queries, piece.keys
    return [
        replace(
            piece,
            queries=replace(queries, first=queries.first + m),
            keys=replace(keys, first=keys.first + m),
            repeat=1,
        )
        for m in range(piece.repeat)
    ]


def _query_key(piece: Piece) -> Any:
    queries = piece.queries
    return (piece.repeat, queries if not isinstance(queries, IndexList) else tuple(queries.indices.tolist()))
