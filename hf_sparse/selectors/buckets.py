"""What hashing selected: for every round the chunk of a bucket that each query and each key fell into."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 16  # queries of a tile: in short texts few fall into one chunk, and more are not much faster
_PAIRS = 1_000_000  # pairs of a tile of queries and keys at a time


@dataclass(frozen=True, eq=False)
class BucketTiles:
    """T groups of queries that fell into the same chunk, and the keys of it and the one before.

    query: int64 [T, C], indices among the queries of the call, -1 behind the last one.
    key: int64 [T, S], positions, -1 where there is none.
    pairs: bool [T, C, S], those that are read, not counting who comes later.
    """

    query: Tensor
    key: Tensor
    pairs: Tensor


@dataclass(frozen=True, eq=False)
class BucketSelection:
    """The keys that are in the chunks of queries, besides those of a static pattern; later ones are to be left out.

    Chunks are numbered; a query reads those of its number and of the one before.

    chunk: tokens of a chunk, at most.
    query: int32 or int64 [R, H, rounds, Q], numbers of the chunks of the queries, the last of the keys.
    key: [R, H_kv, rounds, K], those of the keys, from the first one of the sequence on.
    cycle: how many chunks there are, where the one before the first is the last; None where there is none before it.
    is_counted: a pair counts once for each round that finds it, and a token itself only if nothing else does; else each
        pair counts once.
    """

    chunk: int
    query: Tensor
    key: Tensor
    cycle: int | None = None
    is_counted: bool = False

    @property
    def is_empty(self) -> bool:
        return False

    def counts(self, heads: int, query: Tensor, key: Tensor) -> Tensor:
        """Return how often pairs of positions, int64 [Q] and [K], are found, [R, H, Q, K]; quadratic."""
        begin = self.key.shape[3] - self.query.shape[3]
        asked = self.query[..., query - begin].long()  # [R, H, rounds, Q]
        held = self.key[..., key].long().repeat_interleave(heads // self.key.shape[1], 1)
        found = torch.zeros((*asked.shape[:2], len(query), len(key)), dtype=torch.int64, device=held.device)
        for one in asked.unbind(2):
            for other in held.unbind(2):
                found += self._is_near(one[..., None] - other[:, :, None])
        return found

    def mask(self, heads: int, query: Tensor, key: Tensor) -> Tensor:
        """Return which pairs [R, H, Q, K] of positions are selected, int64 [Q] and [K]; quadratic."""
        return self.counts(heads, query, key) > 0

    def tiles(self, row: int, head: int, kv_head: int) -> Iterator[BucketTiles]:
        """Yield what one head reads; no query is twice in one of them."""
        numbers = self.key[row, kv_head]  # [rounds, K]
        held = numbers.flatten().sort(stable=True)
        keys = held.indices % numbers.shape[1]
        inner = torch.arange(self.chunk, device=numbers.device)
        for place, asked in enumerate(self.query[row, head]):
            own, queries = self._grouped(asked)
            before = own - 1 if self.cycle is None else (own - 1) % self.cycle
            found = []
            for number in (before, own):
                start, stop = (
                    torch.searchsorted(held.values, number, right=right) for right in (False, True)
                )
                at = start[:, None] + inner
                found.append(torch.where(at < stop[:, None], keys[at.clamp(max=len(keys) - 1)], -1))
            listed = torch.cat(found, 1)
            step = max(1, _PAIRS // (_ROWS * listed.shape[1]))
            for query, key in zip(queries.split(step), listed.split(step), strict=True):
                pairs = (query >= 0)[:, :, None] & (key >= 0)[:, None]
                for earlier in range(0 if self.is_counted else place):  # what was found counts no second time
                    one, other = self.query[row, head, earlier][query], numbers[earlier][key]
                    pairs &= ~self._is_near(one[:, :, None] - other[:, None])
                yield BucketTiles(query, key, pairs)

    def read_by_last(self) -> Tensor:
        """Return the positions that the last query reads, int64 [R, H, m], -1 behind the last one; m is 1 at least."""
        heads, kv_heads = self.query.shape[1], self.key.shape[1]
        asked = self.query[..., -1:].unflatten(1, (kv_heads, heads // kv_heads))
        found = self._is_near(asked - self.key[:, :, None]).any(3).flatten(1, 2)  # [R, H, K]
        count = found.sum(2)
        row, head, position = found.nonzero(as_tuple=True)
        before = count.flatten().cumsum(0).view_as(count) - count
        read = torch.full(
            (*count.shape, max(1, int(count.max()))), -1, dtype=torch.int64, device=found.device
        )
        read[row, head, torch.arange(len(position), device=found.device) - before[row, head]] = position
        return read

    def _is_near(self, apart: Tensor) -> Tensor:
        """Tell of differences between the chunks of queries and keys which let the key be read."""
        apart = apart if self.cycle is None else apart % self.cycle
        return apart.bitwise_and(-2) == 0  # 0 or 1

    def _grouped(self, asked: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries by their chunks, [T] and int64 [T, C], those of a chunk in as many rows as they need."""
        ordered = asked.sort(stable=True)
        number, sizes = ordered.values.unique_consecutive(return_counts=True)
        tiles = (sizes + _ROWS - 1) // _ROWS
        group = torch.arange(len(number), device=asked.device).repeat_interleave(tiles)
        starts, firsts = sizes.cumsum(0) - sizes, tiles.cumsum(0) - tiles
        at = starts[group] + (torch.arange(len(group), device=asked.device) - firsts[group]) * _ROWS
        place = at[:, None] + torch.arange(_ROWS, device=asked.device)
        is_own = place < (starts + sizes)[group][:, None]
        return number[group], torch.where(is_own, ordered.indices[place.clamp(max=len(asked) - 1)], -1)
