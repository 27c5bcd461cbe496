"""The most a pattern can gain over dense attention: by its pairs, and by the square tiles that hold them."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from hf_sparse import Pattern
from hf_sparse.plan import Constraint, make_plan
from hf_sparse.plan.pieces import Piece
from hf_sparse.plan.plan import HeadPlan
from hf_sparse.plan.tiles import Tiles

TILE = {"cpu": 64, "cuda": 128}  # tokens on a side


class Limits(NamedTuple):
    """Speed-ups over dense attention under the same causality.

    pairs: if every (query, key) pair costs the same.
    mask_tiles: if every square tile of the mask that holds a pair costs the same: what a block mask can reach.
    list_tiles: the same for tiles of the plan's own lists of queries and keys, where a stride is a run of neighbours.
    """

    pairs: float
    mask_tiles: float
    list_tiles: float

    @property
    def tiles(self) -> float:
        """The larger one: tokens may be regrouped before they are cut into tiles."""
        return max(self.mask_tiles, self.list_tiles)


@lru_cache(maxsize=256)
def limits(pattern: Pattern, length: int, heads: int, causal: bool, tile: int) -> Limits:
    """Return the limits for one sequence of `length` tokens; tiles measure `tile` x `tile`."""
    plan = make_plan(pattern, Constraint(causal), length, length, heads=heads)
    blocks = -(-length // tile)
    dense = blocks * (blocks + 1) // 2 if causal else blocks * blocks
    of_mask = sum(_mask_tiles(group, length, tile) for group in plan.groups) / heads
    of_lists = sum(_list_tiles(group, tile) for group in plan.groups) / heads
    return Limits(plan.dense_pairs / plan.pairs, dense / of_mask, dense / of_lists)


def decode_limit(pattern: Pattern, length: int, heads: int) -> float:
    """Return keys in the cache over keys that one new query sees, the mean where heads differ."""
    plan = make_plan(pattern, Constraint(), 1, length, heads=heads)
    return plan.dense_pairs / plan.pairs


def _mask_tiles(group: HeadPlan, length: int, tile: int) -> int:
    """Return the tiles of the mask that hold a pair, summed over the group's heads."""
    blocks = -(-length // tile)
    held = np.zeros((blocks, blocks), dtype=bool)
    for piece in group.pieces:
        lo, hi = piece.bounds()
        some = np.flatnonzero(hi > lo)
        for member in range(piece.repeat if len(some) else 0):
            rows = (piece.queries.at(some) + member) // tile
            held |= _marked(piece, member, rows, lo[some], hi[some], blocks, tile)
    if not group.tiles:
        return int(held.sum()) * len(group.heads)
    total = 0
    for number in range(len(group.heads)):
        own = held.copy()
        for tiles in group.tiles:
            _mark_lists(own, tiles, number, tile)
        total += int(own.sum())
    return total


def _marked(
    piece: Piece, member: int, rows: np.ndarray, lo: np.ndarray, hi: np.ndarray, blocks: int, tile: int
) -> np.ndarray:
    """Return which tiles [blocks, blocks] hold keys[lo:hi] of the queries in tile rows `rows`."""
    columns = (piece.keys.at(np.arange(piece.keys.count)) + member) // tile
    columns, place = np.unique(columns, return_inverse=True)
    # +1 where a query's columns begin, -1 behind their end; the running sum counts queries per tile.
    steps = np.zeros((blocks, len(columns) + 1), dtype=np.int64)
    np.add.at(steps, (rows, place[lo]), 1)
    np.add.at(steps, (rows, place[hi - 1] + 1), -1)
    marked = np.zeros((blocks, blocks), dtype=bool)
    marked[:, columns] = steps.cumsum(1)[:, :-1] > 0
    return marked


def _mark_lists(held: np.ndarray, tiles: Tiles, number: int, tile: int) -> None:
    lists = tiles.lists[min(number, tiles.lists.shape[0] - 1)]
    block, place = np.nonzero(lists >= 0)
    key = lists[block, place].astype(np.int64) * tiles.key_block
    query = (block + tiles.first_block) * tiles.query_block
    for q in range(0, tiles.query_block, min(tile, tiles.query_block)):
        for k in range(0, tiles.key_block, min(tile, tiles.key_block)):
            row, column = (query + q) // tile, (key + k) // tile
            inside = (row < len(held)) & (column < len(held))
            held[row[inside], column[inside]] = True


def _list_tiles(group: HeadPlan, tile: int) -> float:
    """Return the tiles of the plan's own lists, summed over the group's heads."""
    total = 0.0
    for piece in group.pieces:
        lo, hi = piece.bounds()
        first, last = lo // tile, (hi - 1) // tile
        rows = np.arange(len(lo)) // tile
        held = hi > lo
        if not held.any():
            continue
        # Bounds never decrease, so a block of queries reads a run of tiles from its first query's to its last's.
        starts = np.full(rows[-1] + 1, np.iinfo(np.int64).max)
        stops = np.full(rows[-1] + 1, -1)
        np.minimum.at(starts, rows[held], first[held])
        np.maximum.at(stops, rows[held], last[held])
        used = stops >= 0
        total += piece.repeat * float((stops[used] - starts[used] + 1).sum()) * len(group.heads)
    for tiles in group.tiles:
        listed = int((tiles.lists >= 0).sum()) * (len(group.heads) // tiles.lists.shape[0])
        total += listed * tiles.query_block * tiles.key_block / tile**2
    return total
