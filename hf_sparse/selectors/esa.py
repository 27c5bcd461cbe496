"""Essential Sparse Attention of the Unified Cache Manager (github.com/ModelEngine-Group/unified-cache-management).

A block is known by the mean of its keys as attention sees them, rotated. The queries of each key head are averaged, and
their plain products with the means are added over all key heads: one selection for all heads of a layer.

As published, blocks are retrieved anew every 5 tokens of a generation. The same holds here for a prompt, where each 5
queries have lists of their own; a larger `query_block` makes reading prompts faster. `keep` is a share of all blocks,
those always kept included, as it is for every selector; the publication takes its share of the others.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..patterns.registry import register_pattern
from .block_selector import BlockSelector
from .representations import products


@register_pattern("esa")
@dataclass(frozen=True)
class EssentialSparseAttention(BlockSelector):
    """The blocks whose mean keys all heads together want most."""

    keep: int | float | tuple[int | float, ...] = (
        0.3  # a share of the blocks, or a number; one, or one per layer
    )
    query_block: int | None = 5  # queries that share what the first of them selects; None is `block`

    def summarise(self, key: Tensor, query: Tensor) -> Tensor:
        return key.mean(3)

    def score(self, query: Tensor, blocks: Tensor) -> Tensor:
        mean = query[:, :, :, -1].unflatten(1, (blocks.shape[1], -1)).mean(2)
        return products(mean, blocks).sum(1, keepdim=True)
