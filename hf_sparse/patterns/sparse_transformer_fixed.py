"""Sparse Transformer, fixed (Child et al., 2019, arXiv:1904.10509, section 4.3): blocks, and their last columns.

SparseTransformerFixed(block=4, summary=1):

    key  0 1 2 3 4 5 6 7 8 9
    0    x . . . . . . . . .
    1    x x . . . . . . . .
    2    x x x . . . . . . .
    3    x x x x . . . . . .
    4    . . . x x . . . . .
    5    . . . x x x . . . .
    6    . . . x x x x . . .
    7    . . . x x x x x . .
    8    . . . x . . . x x .
    9    . . . x . . . x x x

SparseTransformerFixed(block=3, summary=1, heads="split"):

    key  0 1 2 3 4 5 6 7     head 0 of 2
    0    x . . . . . . .
    1    x x . . . . . .
    2    x x x . . . . .
    3    . . . x . . . .
    4    . . . x x . . .
    5    . . . x x x . .
    6    . . . . . . x .
    7    . . . . . . x x

    key  0 1 2 3 4 5 6 7     head 1 of 2
    0    x . . . . . . .
    1    . x . . . . . .
    2    . . x . . . . .
    3    . . x x . . . .
    4    . . x . x . . .
    5    . . x . . x . .
    6    . . x . . x x .
    7    . . x . . x . x
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .algebra import check_halves
from .base import Context, Pattern
from .checks import check_choice, check_count
from .parts import Part, block_part, periodic, window_part
from .registry import register_pattern


@register_pattern("sparse_transformer_fixed")
@dataclass(frozen=True)
class SparseTransformerFixed(Pattern):
    """The query's own block, and the last summary keys of every block: ``k % block >= block - summary``."""

    block: int = 128  # tokens; a query sees its own block
    summary: int = 8  # last tokens of every block, which every query sees
    heads: str = (
        "merged"  # "merged": every head sees both; "split": the first half the block, the rest the summaries
    )

    def __post_init__(self) -> None:
        check_count("block", self.block, 1)
        check_count("summary", self.summary, 1)
        if self.summary > self.block:
            raise ValueError(
                f"summary must be at most block, the tokens of a block, got summary={self.summary} and "
                f"block={self.block}"
            )
        check_choice("heads", self.heads, ("merged", "split"))

    def check_fit(self, heads: int, layers: int) -> None:
        if self.heads == "split":
            check_halves(self, heads)

    def allows(self, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = query // self.block == key // self.block
        summary = key % self.block >= self.block - self.summary
        return (
            own | summary if self.heads == "merged" else torch.where(head < context.heads // 2, own, summary)
        )

    def parts(self, context: Context) -> Sequence[Part]:
        own = block_part(self.block)
        summary = Part(periodic(self.block, self.block - self.summary, self.summary))
        if self.heads == "merged":
            return [own, summary]
        first, rest = range(context.heads // 2), tuple(range(context.heads // 2, context.heads))
        parts = [replace(summary, heads=rest), replace(window_part(1), heads=rest)]
        return [replace(own, heads=tuple(first)), *parts] if first else parts
