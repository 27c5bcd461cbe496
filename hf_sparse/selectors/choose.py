"""Choosing among scored blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class QueryBlocks:
    """The blocks of queries of one call on a sequence, J of them.

    first: number of the first block; block b of size s holds the positions from b * s on.
    asks: int64 [J], position of the query that selects for a block: its first one.
    low, high: int64 [J], numbers of the first and one past the last block of keys that may be selected.
    counts: int64 [J], how many are.
    """

    first: int
    asks: np.ndarray
    low: np.ndarray
    high: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.asks)


def candidates(blocks: QueryBlocks, count: int, device: torch.device) -> Tensor:
    """Return which of `count` blocks of keys may be selected, bool [J, count]."""
    low, high = (
        torch.from_numpy(x).to(device, non_blocking=True)[:, None] for x in (blocks.low, blocks.high)
    )
    number = torch.arange(count, device=device)
    return (number >= low) & (number < high)


def masses(scores: Tensor, among: Tensor) -> Tensor:
    """Return the softmax of scores [..., J, n] over the blocks that may be selected, bool [J, n]; nan if none may."""
    return _numbers(scores).masked_fill_(~among, float("-inf")).softmax(-1)


def _numbers(scores: Tensor) -> Tensor:
    """Return scores among which one that is no number is not the best, nor makes the others none."""
    least = torch.finfo(scores.dtype).min
    return scores.nan_to_num(nan=least, neginf=least)


def best(scores: Tensor, blocks: QueryBlocks) -> Tensor:
    """Return the numbers of the best blocks, int64 [R, G, J, m], the best first; of equal ones the lower number first.

    Args:
        scores: [R, G, J, n]; those of blocks that may not be selected are not looked at.
    """
    most = int(blocks.counts.max(initial=0))
    if not most:
        return scores.new_zeros((*scores.shape[:3], 0), dtype=torch.int64)
    scores = _numbers(scores).masked_fill_(~candidates(blocks, scores.shape[3], scores.device), float("-inf"))
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :most]
    counts = torch.from_numpy(blocks.counts).to(scores.device, non_blocking=True)[:, None]
    return order.masked_fill_(torch.arange(most, device=scores.device) >= counts, -1)
