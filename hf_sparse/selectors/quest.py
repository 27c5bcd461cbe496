"""Quest (Tang et al., 2024, arXiv:2406.10774): pages of keys scored by the most that any key of theirs could score.

A page is known by the least and the greatest value of each channel; the score of a query is the sum over channels of
the larger of its two products, which no key of the page exceeds.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..patterns.checks import check_count
from ..patterns.registry import register_pattern
from .topk_blocks import TopKBlocks


@register_pattern("quest")
@dataclass(frozen=True)
class Quest(TopKBlocks):
    """The pages with the highest bounds."""

    block: int = 16  # tokens per page
    dense_layers: int = 2  # layers at the bottom that read everything
    represent: str = "minmax"  # what represents a page
    least: int = 3  # pages that are read at least

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("least", self.least, 1)

    def wanted(self, seen: int) -> int:
        return min(seen, max(self.least, super().wanted(seen)))
