"""Block-local attention (Image Transformer, Parmar et al., 2018, arXiv:1802.05751): a query's block and those before.

`neighbours=0` is the chunked attention of Llama 4.

BlockLocal(block=2, neighbours=1):

    key  0 1 2 3 4 5 6
    0    x . . . . . .
    1    x x . . . . .
    2    x x x . . . .
    3    x x x x . . .
    4    . . x x x . .
    5    . . x x x x .
    6    . . . . x x x

    key  0 1 2 3 4 5 6     bidirectional
    0    x x x x . . .
    1    x x x x . . .
    2    x x x x x x .
    3    x x x x x x .
    4    . . x x x x x
    5    . . x x x x x
    6    . . . . x x x
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .base import Context, Pattern
from .checks import check_count, check_product
from .parts import Part, block_part
from .registry import register_pattern


@register_pattern("block_local")
@dataclass(frozen=True)
class BlockLocal(Pattern):
    """The query's own block and its neighbours: ``|q // block - k // block| <= neighbours``."""

    block: int = 256  # tokens
    neighbours: int = 1  # blocks before a query's own that it sees; bidirectional: as many behind it

    def __post_init__(self) -> None:
        check_count("block", self.block, 1)
        check_count("neighbours", self.neighbours, 0)
        check_product("block * (neighbours + 1)", self.block, self.neighbours + 1)

    def allows(self, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query // self.block - key // self.block).abs() <= self.neighbours

    def parts(self, context: Context) -> Sequence[Part]:
        return [block_part(self.block, self.neighbours, self.neighbours)]
