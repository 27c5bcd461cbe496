"""Tiles: what is no interval. For every block of queries a list of the key blocks that it reads.

The lists come from a pattern that draws them, or are found by asking a predicate block by block, never n x n at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..patterns.parts import Bound, Drawn
from .intervals import Leftover, is_in

Predicate = Callable[[Tensor, Tensor, Tensor], Tensor]
BLOCK = 64  # tokens per block of a predicate, queries and keys alike
_SEARCH_KEYS = 8192  # keys of which a block of queries is asked at a time
_DRAWN = 1024  # query blocks for which is drawn at a time
_CHECKED = 2**20  # listed pairs that are checked at a time


@dataclass(frozen=True, eq=False)
class Tiles:
    """For each head and each block of queries, the blocks of keys it reads.

    Block b of size s holds the positions from b * s up to (b + 1) * s; the first and last block may be cut by the ends
    of the call. Over a cache with columns, slots take the place of positions, and `first` is 0.

    heads: the query heads, in the order of the lists.
    query_block, key_block: tokens per block.
    first_block: number of the block of the first query.
    lists: int32 [H or 1, q_blocks, m], increasing is not promised, -1 where a list is shorter; 1 serves all heads.
    masked: bool [q_blocks], True where some pair of a listed tile is not allowed.
    allowed: predicate on (head, query, key), int64 positions broadcastable with one another, True = may attend. It
        answers for listed tiles only.
    pairs: allowed pairs, summed over heads.
    q_len, k_len, first: as in `Plan`.
    """

    heads: tuple[int, ...]
    query_block: int
    key_block: int
    first_block: int
    lists: np.ndarray
    masked: np.ndarray
    allowed: Predicate
    pairs: int
    q_len: int
    k_len: int
    first: int

    @property
    def q_blocks(self) -> int:
        return self.lists.shape[1]

    def rows(self, start: int, stop: int) -> tuple[int, int]:
        """Return the first and one past the last query index of blocks start .. stop."""
        offset = self.first + self.k_len - self.q_len
        first = (self.first_block + start) * self.query_block - offset
        return max(first, 0), min((self.first_block + stop) * self.query_block - offset, self.q_len)

    def check(
        self,
        start: int,
        stop: int,
        device: torch.device | str = "cpu",
        own: slice = slice(None),
    ) -> tuple[Tensor, Tensor]:
        """Return what blocks start .. stop of heads `own` (places in `heads`) read, pair by pair.

        Returns:
            Key indices [H or 1, n, S], S = m * key_block, clamped into the call where they lie outside; and which pairs
            are allowed, bool [H, n, query_block, S]. Rows before the first and after the last query are False.
        """
        blocks = torch.arange(start, stop, device=device) + self.first_block
        numbers = self.lists[own if len(self.lists) > 1 else slice(None), start:stop]
        lists = torch.from_numpy(np.ascontiguousarray(numbers)).to(device).long()
        inner = torch.arange(self.key_block, device=device)
        keys = (lists[..., None] * self.key_block + inner).flatten(2)
        query = blocks[:, None] * self.query_block + torch.arange(self.query_block, device=device)
        begin = self.first + self.k_len - self.q_len
        real = (lists >= 0)[..., None].expand(*lists.shape, self.key_block).flatten(2)
        real = real & (keys >= self.first) & (keys < self.first + self.k_len)
        heads = torch.tensor(self.heads[own], device=device)[:, None, None, None]
        allowed = self.allowed(heads, query[None, :, :, None], keys[:, :, None, :])
        allowed = (
            allowed & real[:, :, None] & ((query >= begin) & (query < begin + self.q_len))[None, :, :, None]
        )
        shape = (len(heads), stop - start, self.query_block, keys.shape[-1])
        return (keys - self.first).clamp_(0, self.k_len - 1), allowed.expand(shape)


def tiles_of(
    allowed: Predicate,
    heads: tuple[int, ...],
    q_len: int,
    k_len: int,
    first: int,
    bounds: tuple[tuple[Bound, ...], tuple[Bound, ...]] = ((), ()),
) -> Tiles:
    """Return the tiles of a predicate by asking it for BLOCK x _SEARCH_KEYS pairs at a time.

    bounds: starts and stops known to hold every allowed key; only the keys between them are asked for.
    """
    head = torch.tensor(heads)[:, None, None]
    begin = first + k_len - q_len
    first_block = begin // BLOCK
    found: list[list[np.ndarray]] = []
    masked, pairs = [], 0
    for block in range(first_block, (begin + q_len - 1) // BLOCK + 1):
        low, high = max(block * BLOCK, begin), min((block + 1) * BLOCK, begin + q_len)
        query = torch.arange(low, high)[None, :, None]
        least, most = _range(bounds, np.array([low]), np.array([high - 1]), first, first + k_len)
        held: list[Tensor] = []
        key_first = int(least[0]) // BLOCK * BLOCK
        for key_start in range(key_first, int(most[0]), _SEARCH_KEYS):
            key = torch.arange(key_start, min(key_start + _SEARCH_KEYS, int(most[0])))
            pair = allowed(head, query, key[None, None, :]) & (key >= first)
            pair = pair.expand(len(heads), high - low, len(key))
            width = -(-len(key) // BLOCK) * BLOCK
            held.append(torch.nn.functional.pad(pair, (0, width - len(key))).unflatten(-1, (-1, BLOCK)))
        if not held:
            found.append([np.empty(0, dtype=np.int32)] * len(heads))
            masked.append(False)
            continue
        counts = torch.cat(held, 2).sum((1, 3))  # [H, key blocks]
        pairs += int(counts.sum())
        some = counts > 0
        full = BLOCK * BLOCK
        masked.append(bool(((counts < full) & some).any()))
        found.append(
            [(torch.nonzero(row)[:, 0].numpy() + key_first // BLOCK).astype(np.int32) for row in some]
        )
    alike = all(np.array_equal(row[0], other) for row in found for other in row[1:])
    rows = [row[:1] if alike else row for row in found]
    longest = max((len(blocks) for row in rows for blocks in row), default=0)
    lists = np.full((1 if alike else len(heads), len(rows), longest), -1, dtype=np.int32)
    for number, row in enumerate(rows):
        for h, blocks in enumerate(row):
            lists[h, number, : len(blocks)] = blocks
    return Tiles(
        heads, BLOCK, BLOCK, first_block, lists, np.array(masked), allowed, pairs, q_len, k_len, first
    )


def drawn_tiles(
    leftover: Leftover,
    allowed: Predicate,
    bounds: tuple[tuple[Bound, ...], tuple[Bound, ...]],
    heads: tuple[int, ...],
    q_len: int,
    k_len: int,
    first: int,
) -> Tiles:
    """Return the tiles of drawn blocks.

    Args:
        leftover: the drawn blocks and the intervals whose pairs they leave out.
        allowed: the pairs of drawn blocks that remain.
        bounds: starts and stops that hold for every pair.
    """
    keys = leftover.interval.keys
    assert isinstance(keys, Drawn)
    begin = first + k_len - q_len
    first_block = begin // keys.query_block
    blocks = torch.arange(first_block, (begin + q_len - 1) // keys.query_block + 1)
    head = torch.tensor(heads)
    lists, masked = [], []
    for part in blocks.split(_DRAWN):
        drawn = keys.draw(head, part).numpy()
        low = np.maximum(part.numpy() * keys.query_block, begin)[None, :, None]
        high = np.minimum((part.numpy() + 1) * keys.query_block, begin + q_len)[None, :, None] - 1
        key_low = drawn * keys.key_block
        key_high = key_low + keys.key_block
        least, most = _range(bounds, low, high, first, first + k_len)
        drawn[(drawn < 0) | (key_high <= least) | (key_low >= most)] = -1
        whole = (high - low == keys.query_block - 1) & (key_low >= first) & (key_high <= first + k_len)
        whole &= _is_whole(leftover, bounds, low, high, key_low, key_high)
        query = part[:, None] * keys.query_block + torch.arange(keys.query_block)
        for skipped in leftover.interval.skip:
            whole &= ~is_in(skipped, query).any(1).numpy()[None, :, None]
        lists.append(drawn.astype(np.int32))
        masked.append(((drawn >= 0) & ~whole).any((0, 2)))
    tiles = Tiles(
        heads,
        keys.query_block,
        keys.key_block,
        first_block,
        np.concatenate(lists, 1),
        np.concatenate(masked),
        allowed,
        0,
        q_len,
        k_len,
        first,
    )
    return _counted(tiles)


def _is_whole(
    leftover: Leftover,
    bounds: tuple[tuple[Bound, ...], tuple[Bound, ...]],
    low: np.ndarray,
    high: np.ndarray,
    key_low: np.ndarray,
    key_high: np.ndarray,
) -> np.ndarray:
    """Tell of which blocks of keys every query from `low` to `high` sees all, and no other interval anything."""
    whole = np.ones(key_low.shape, dtype=bool)
    for bound in bounds[0]:
        whole &= key_low >= bound.at(high)
    for bound in bounds[1]:
        whole &= key_high <= bound.at(low)
    for other in leftover.earlier:
        apart = np.zeros(key_low.shape, dtype=bool)
        for bound in other.starts:
            apart |= key_high <= bound.at(low)
        for bound in other.stops:
            apart |= key_low >= bound.at(high)
        whole &= apart
    return whole


def _range(
    bounds: tuple[tuple[Bound, ...], tuple[Bound, ...]],
    low: np.ndarray,
    high: np.ndarray,
    first: int,
    end: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the least key position, and one past the last, that any query from `low` to `high` may see."""
    least, most = np.full_like(low, first), np.full_like(high, end)
    for bound in bounds[0]:
        least = np.maximum(least, bound.at(low))
    for bound in bounds[1]:
        most = np.minimum(most, bound.at(high))
    return least, most


def _counted(tiles: Tiles) -> Tiles:
    """Return the tiles with their pairs counted, and without listed blocks in which nothing is allowed."""
    lists, masked = tiles.lists, tiles.masked.copy()
    each = tiles.query_block * tiles.key_block
    pairs = int((lists[:, ~masked] >= 0).sum()) * each
    if lists.shape[0] == 1:
        pairs *= len(tiles.heads)
    for numbers in _chunks(
        np.flatnonzero(masked), max(1, _CHECKED // max(1, each * lists.shape[2] * len(tiles.heads)))
    ):
        start, stop = int(numbers[0]), int(numbers[-1]) + 1
        _, allowed = tiles.check(start, stop)
        held = (
            allowed[:, torch.from_numpy(numbers - start)]
            .unflatten(-1, (-1, tiles.key_block))
            .sum((2, 4))
            .numpy()
        )
        pairs += int(held.sum())
        if lists.shape[0] == held.shape[0]:
            lists[:, numbers] = np.where(held > 0, lists[:, numbers], -1)
            masked[numbers] = ((held > 0) & (held < each)).any((0, 2))
    return replace(tiles, lists=lists, masked=masked, pairs=pairs)


def _chunks(numbers: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Yield runs of neighbouring numbers, at most `most` in a run."""
    for run in np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1):
        for start in range(0, len(run), most):
            if len(run):
                yield run[start : start + most]
