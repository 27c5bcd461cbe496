"""The best blocks by a representation of their keys (MoBA, Lu et al., 2025, arXiv:2502.13189, has the mean).

A query reads the first block, its own, those just before it, and of the rest those whose representation it scores
highest. Key heads select for themselves; the query heads of a key head agree by the mean of their scores.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..patterns.checks import check_choice
from ..patterns.registry import register_pattern
from .block_selector import BlockSelector
from .representations import REPRESENTATIONS, over_groups


@register_pattern("topk_blocks")
@dataclass(frozen=True)
class TopKBlocks(BlockSelector):
    """The blocks with the highest scores."""

    represent: str = "mean"  # what represents a block: mean, first, weighted, minmax or hash

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("represent", self.represent, tuple(REPRESENTATIONS))

    def summarise(self, key: Tensor, query: Tensor) -> Tensor:
        return REPRESENTATIONS[self.represent].summarise(key, query)

    def score(self, query: Tensor, blocks: Tensor) -> Tensor:
        return over_groups(REPRESENTATIONS[self.represent].score(query[:, :, :, -1], blocks), blocks.shape[1])
