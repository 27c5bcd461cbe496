"""KVStar of the Unified Cache Manager (github.com/ModelEngine-Group/unified-cache-management).

Each block keeps, for each key head, a quarter of its channels, those with the greatest mean magnitude, and of those the
means of neighbouring keys. The latest 8 queries spread a softmax of their plain products over all these means of the
blocks that may be selected; a block's score is the mass it gets from all 8 and all query heads of the key head. What
is selected holds for the next 8 queries.

The publication chooses the channels once, by all keys of a prompt, whose last 8 queries select: ``selection="prompt"``
does so for the prompt of a generation. Otherwise each block chooses its channels when it is whole, and queries select
for those after them, so that no token depends on a later one. As published, the products are not scaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..patterns.checks import check_count, check_ratio
from ..patterns.registry import register_pattern
from .block_selector import BlockSelector
from .choose import masses


@register_pattern("kvstar")
@dataclass(frozen=True)
class KVStar(BlockSelector):
    """The blocks that get the most attention from the last queries, by the strongest channels of merged keys."""

    looks_back: ClassVar[int] = 8

    keep: int | float | tuple[int | float, ...] = (
        0.25  # a share of the blocks, or a number; one, or one per layer
    )
    query_block: int | None = 8  # queries that share what the first of them selects; None is `block`
    channels: float = 0.25  # share of the channels that a block keeps
    pairs: int = 2  # neighbouring keys with one mean; must divide block
    selection: str = (
        "causal"  # or "prompt": all keys and the last queries of a generation's prompt decide for it
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio("channels", self.channels)
        check_count("pairs", self.pairs, 1)
        if self.block % self.pairs:
            raise ValueError(f"pairs must divide block={self.block}, got {self.pairs}; choose one that does")

    @property
    def scores_per_block(self) -> int:
        return self.looks_back * (self.block // self.pairs)

    def summarise(self, key: Tensor, query: Tensor) -> Tensor:
        """Return the means of the kept channels, and as a last row the numbers of these, [R, H_kv, n, M + 1, C]."""
        count = max(1, round(self.channels * key.shape[4]))
        size = key.abs().mean((2, 3) if self.looks_ahead else 3, keepdim=True)
        order = size.sort(dim=-1, descending=True, stable=True).indices
        kept = order[..., :count].expand(-1, -1, key.shape[2], -1, -1)
        means = key.unflatten(3, (-1, self.pairs)).mean(4)
        return torch.cat((_at(means, kept), kept.to(key.dtype)), 3)

    def score_among(self, query: Tensor, blocks: Tensor, among: Tensor) -> Tensor:
        own = query.unflatten(1, (blocks.shape[1], -1)).transpose(3, 4)  # [R, H_kv, G, W, J, D]
        flat = own.flatten(2, 4)[:, :, None].expand(-1, -1, blocks.shape[2], -1, -1)
        means, kept = blocks[..., :-1, :], blocks[..., -1:, :].to(torch.int64)
        whole = (_at(flat, kept) @ means.mT).logsumexp(4)  # [R, H_kv, n, G * W * J]
        found = masses(whole.mT.unflatten(2, own.shape[2:5]), among)
        is_real = (own != 0).any(5, keepdim=True)  # not 0, as where the sequence has not begun
        return torch.where(is_real, found, 0).sum((2, 3))


def _at(x: Tensor, channels: Tensor) -> Tensor:
    """Return the channels, int64 [..., 1, C], of x [..., N, D], [..., N, C]."""
    return x.gather(-1, channels.expand(*x.shape[:-1], -1))
