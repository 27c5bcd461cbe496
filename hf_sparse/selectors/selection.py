"""What was selected: for every block of queries of a sequence, the blocks of keys that it reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .buckets import BucketSelection


@dataclass(frozen=True, eq=False)
class Selection:
    """Blocks of keys read by the queries of one sequence, besides those of a static pattern.

    Block b of size s holds the positions from b * s up to (b + 1) * s.

    key_block, query_block: tokens per block.
    first_block: number of the first block of queries.
    lists: int64 [R, H_kv or 1, J, m], numbers of blocks, all before the queries; -1 behind the last one of a list.
    counts: int64 [J], how many entries a list has; m is the most of them.
    exact: False where lists may have fewer.
    memo: what was made of it, while single queries go on with it.
    """

    key_block: int
    query_block: int
    first_block: int
    lists: Tensor
    counts: np.ndarray
    exact: bool = True
    memo: dict[str, Any] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """True where nothing is selected."""
        return not self.lists.shape[3]

    def rows(self, start: int, stop: int, begin: int, end: int) -> tuple[int, int]:
        """Return the first and one past the last query index of blocks start .. stop, for queries begin .. end."""
        first = (self.first_block + start) * self.query_block
        last = (self.first_block + stop) * self.query_block
        return max(first, begin) - begin, min(last, end) - begin

    def positions(self, lists: Tensor) -> tuple[Tensor, Tensor]:
        """Return the positions [..., m * key_block] of listed blocks [..., m], and which of them are real."""
        inner = torch.arange(self.key_block, device=lists.device)
        keys = (lists.clamp(min=0)[..., None] * self.key_block + inner).flatten(-2)
        return keys, (lists >= 0).repeat_interleave(self.key_block, -1)

    def mask(self, heads: int, query: Tensor, key: Tensor) -> Tensor:
        """Return which pairs [R, H, Q, K] of positions are selected, int64 [Q] and [K]; quadratic."""
        rows, own, blocks, most = self.lists.shape
        number, key = query // self.query_block - self.first_block, key // self.key_block
        last = int(key.max()) + 1 if len(key) else 0
        read = self.lists.new_zeros((rows, own, blocks, last + 1), dtype=torch.bool)
        if most:
            is_read = (self.lists >= 0) & (self.lists < last)
            read.scatter_(3, torch.where(is_read, self.lists, last), True)
        return read[:, :, number][..., key].repeat_interleave(heads // own, 1)


AnySelection = Selection | BucketSelection
