"""Gather-Scatter Attention of the Unified Cache Manager (github.com/ModelEngine-Group/unified-cache-management).

A block is cut into `representatives` equal runs of tokens, each represented by its mean key, made as long as 1. A query
head's score of a block is its greatest product with one of them, and the mean over all query heads decides: one
selection for all heads of a layer, as published. There a block has one representative, which is the default.

A share of the blocks is read, at least `least` and at most `most` of them: short sequences are read whole, long ones at
a fixed cost. A `keep` that is a number is not limited.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from ..patterns.checks import check_count
from ..patterns.registry import register_pattern
from .block_selector import BlockSelector
from .representations import products


@register_pattern("gsa")
@dataclass(frozen=True)
class GatherScatterAttention(BlockSelector):
    """The blocks of which some part points where the queries do."""

    keep: int | float | tuple[int | float, ...] = (
        0.3  # a share of the blocks, or a number; one, or one per layer
    )
    block: int = 128  # tokens per block of keys
    least: int = 32  # blocks that are read at least, where `keep` is a share
    most: int = 48  # and at most
    representatives: int = 1  # per block; must divide it

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("least", self.least, 1)
        check_count("most", self.most, 1)
        check_count("representatives", self.representatives, 1)
        if self.least > self.most:
            raise ValueError(
                f"least must not exceed most={self.most}, got {self.least}; lower it or raise most"
            )
        if self.block % self.representatives:
            raise ValueError(
                f"representatives must divide block={self.block}, got {self.representatives}; choose one that does"
            )

    @property
    def scores_per_block(self) -> int:
        return self.representatives

    def wanted(self, seen: int) -> int:
        count = super().wanted(seen)
        return min(seen, max(self.least, min(self.most, count))) if isinstance(self.keep, float) else count

    def summarise(self, key: Tensor, query: Tensor) -> Tensor:
        return normalize(key.unflatten(3, (self.representatives, -1)).mean(4), dim=-1)

    def score(self, query: Tensor, blocks: Tensor) -> Tensor:
        each = products(query[:, :, :, -1], blocks.flatten(2, 3))
        return each.unflatten(3, (-1, self.representatives)).amax(-1).mean(1, keepdim=True)
