"""Shifted sparse attention, S2 (LongLoRA, Chen et al., 2023, arXiv:2309.12307): groups, shifted in half of the heads.

The shifted groups do not wrap around: the first one is half as long. (The published code rolls the sequence, and its
first tokens then see the last ones.)

Shifted(group=4):

    key  0 1 2 3 4 5 6 7     head 0 of 2
    0    x . . . . . . .
    1    x x . . . . . .
    2    x x x . . . . .
    3    x x x x . . . .
    4    . . . . x . . .
    5    . . . . x x . .
    6    . . . . x x x .
    7    . . . . x x x x

    key  0 1 2 3 4 5 6 7     head 1 of 2
    0    x . . . . . . .
    1    x x . . . . . .
    2    . . x . . . . .
    3    . . x x . . . .
    4    . . x x x . . .
    5    . . x x x x . .
    6    . . . . . . x .
    7    . . . . . . x x
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .algebra import check_halves
from .base import Context, Pattern
from .checks import check_count
from .parts import Part, block_part
from .registry import register_pattern


@register_pattern("shifted")
@dataclass(frozen=True)
class Shifted(Pattern):
    """A query's own group of tokens; the groups of the second half of the heads begin half a group earlier."""

    group: int = 512  # tokens, an even number

    def __post_init__(self) -> None:
        check_count("group", self.group, 2)
        if self.group % 2:
            raise ValueError(f"group must be even, to be shifted by half of it, got {self.group}")

    def check_fit(self, heads: int, layers: int) -> None:
        check_halves(self, heads)

    def allows(self, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        shift = torch.where(head < context.heads // 2, 0, self.group // 2)
        return (query + shift) // self.group == (key + shift) // self.group

    def parts(self, context: Context) -> Sequence[Part]:
        first, rest = range(context.heads // 2), range(context.heads // 2, context.heads)
        shifted = block_part(self.group, shift=self.group // 2, heads=tuple(rest))
        return [block_part(self.group, heads=tuple(first)), shifted] if first else [shifted]
