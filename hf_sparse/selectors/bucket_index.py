"""The buckets of tokens, and their places in them."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..patterns.parts import Bound
from .buckets import BucketSelection
from .index import Index
from .lsh import LSH
from .room import appended

_HASHED = 2**22  # products with directions held at a time


class BucketIndex(Index[LSH]):
    """Keeps for each key the number of the chunk of its bucket in every round, and how many keys each bucket has."""

    _tensors = ("_chunks", "_sizes")

    def __init__(self, selector: LSH) -> None:
        super().__init__(selector)
        self._buckets = 0
        self._chunks: Tensor | None = None  # [R, H_kv, room, rounds], the first `length` filled
        self._sizes: Tensor | None = None  # int64 [R, H_kv, rounds, buckets]

    @property
    def rows(self) -> int:
        return 0 if self._chunks is None else self._chunks.shape[0]

    def _select(self, query: Tensor, key: Tensor, first: int, starts: tuple[Bound, ...]) -> BucketSelection:
        selector, new = self.selector, key[:, :, key.shape[2] - query.shape[2] :].to(query.dtype)
        if selector.shared_qk and query.shape[1] != key.shape[1]:
            raise ValueError(
                f"shared_qk=True is for models whose queries are their keys, but this one has {query.shape[1]} query "
                f"heads and {key.shape[1]} key heads; leave it False"
            )
        if not self.length:
            self._buckets = selector.buckets_of(query.shape[2])
            self._chunks = None
            self._sizes = new.new_zeros((*new.shape[:2], selector.rounds, self._buckets), dtype=torch.int64)
        hashed = self._hashed(query if selector.shared_qk else new, key.shape[1]).squeeze(2)
        ordered = hashed.sort(stable=True)  # [R, H_kv, rounds, Q]
        places = torch.arange(query.shape[2], device=query.device).expand_as(ordered.values)
        assert self._sizes is not None
        inner = places - torch.searchsorted(ordered.values, ordered.values)
        rank = torch.empty_like(inner).scatter_(3, ordered.indices, inner) + self._sizes.gather(3, hashed)
        chunks = self._numbered(hashed, rank)
        self._chunks = appended(self._chunks, self.length, chunks.transpose(2, 3))
        held = self._chunks[:, :, : self.length + query.shape[2]].transpose(2, 3)
        if selector.looks_ahead and not self.length:
            selection = self._of_whole_prompt(ordered.indices)
        elif selector.shared_qk:
            selection = BucketSelection(selector.block, chunks, held, is_counted=True)
        else:
            asked = self._asked(query, key.shape[1], ordered.values, ordered.indices)
            selection = BucketSelection(selector.block, asked, held)
        self._sizes = self._sizes.scatter_add(3, hashed, torch.ones_like(hashed))
        return selection

    def _asked(self, query: Tensor, kv_heads: int, buckets: Tensor, order: Tensor) -> Tensor:
        """Return the number of the chunk of each query, which the latest key of its bucket is in, [R, H, rounds, Q].

        Args:
            buckets, order: of the new keys, [R, H_kv, rounds, Q]: their buckets in order, and which they are.
        """
        assert self._sizes is not None
        length = query.shape[2]
        hashed = self._hashed(query, kv_heads)  # [R, H_kv, G, rounds, Q]
        own = hashed.transpose(2, 3).flatten(3).contiguous()  # [R, H_kv, rounds, G * Q]
        query_place = torch.arange(length, device=query.device).repeat(own.shape[3] // length)
        buckets = buckets.contiguous()
        until = torch.searchsorted(buckets * length + order, own * length + query_place, right=True)
        count = until - torch.searchsorted(buckets, own) + self._sizes.gather(3, own)
        return self._numbered(own, count - 1).unflatten(3, (-1, length)).transpose(2, 3).flatten(1, 2)

    def _of_whole_prompt(self, order: Tensor) -> BucketSelection:
        """Return what a prompt reads whose tokens are sorted by their buckets in every round, [R, H, rounds, Q]."""
        size = self.selector.block
        length = order.shape[3]
        count = -(-length // size)
        place = torch.arange(length, device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(3, order, place)
        rounds = torch.arange(order.shape[2], device=order.device)[:, None]
        chunks = rounds * count + rank // size
        return BucketSelection(size, chunks, chunks, count * order.shape[2], is_counted=True)

    def _numbered(self, buckets: Tensor, rank: Tensor) -> Tensor:
        """Return one number for the round, bucket and chunk of places in buckets [R, H_kv, rounds, N]."""
        rounds = torch.arange(buckets.shape[2], device=buckets.device)[:, None]
        number = (rounds * self._buckets + buckets) * self._spacing + rank // self.selector.block
        return number.to(torch.int32) if self._spacing < 2**32 else number

    @property
    def _spacing(self) -> int:
        """How far apart the chunks of two buckets are numbered, so that none is one before another's first."""
        every = self.selector.rounds * self._buckets
        return 2**31 // every if every <= 2**10 else 2**32

    def _hashed(self, x: Tensor, kv_heads: int) -> Tensor:
        """Return the buckets of x [R, H, N, D], int64 [R, H_kv, G, rounds, N]."""
        selector = self.selector
        directions = _directions(kv_heads, x.shape[3], selector.rounds, self._buckets // 2, selector.seed)
        directions = directions.to(x.device, x.dtype)
        parts = max(1, _HASHED // (x.shape[0] * x.shape[1] * selector.rounds * self._buckets))
        found = []
        for part in x.unflatten(1, (kv_heads, -1)).split(parts, 3):
            turned = torch.einsum("rhgnd,hdkb->rhgknb", part, directions)
            found.append(torch.cat((turned, -turned), -1).argmax(-1))
        return torch.cat(found, 4)

    def _take_back(self, length: int) -> None:
        if self._chunks is None or self._sizes is None or not length:
            return
        gone = self._chunks[:, :, length : self.length].transpose(2, 3).long()
        rounds = torch.arange(gone.shape[2], device=gone.device)[:, None]
        buckets = gone // self._spacing - rounds * self._buckets
        self._sizes = self._sizes.scatter_add(3, buckets, -torch.ones_like(buckets))

    def _alike(self, name: str, parts: list[Tensor]) -> list[Tensor]:
        return [x[:, :, : self.length] for x in parts] if name == "_chunks" else parts


@lru_cache(maxsize=16)
def _directions(heads: int, size: int, rounds: int, count: int, seed: int) -> Tensor:
    """Return random directions [H_kv, D, rounds, count], drawn where every machine draws the same."""
    made = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((heads, size, rounds, count), generator=made)
