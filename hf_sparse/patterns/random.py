"""Random attention (the random part of BigBird, Zaheer et al., 2020, arXiv:2007.14062): keys drawn once for all.

What a query sees depends on the seed, the layer, the head and the query's position alone, on every device.

Random(keys_per_query=2, seed=0):

    key  0 1 2 3 4 5 6 7     head 0 of 2
    0    x . . . . . . .
    1    x x . . . . . .
    2    x x x . . . . .
    3    . x x x . . . .
    4    x x . . x . . .
    5    x . . . . x . .
    6    . . . x . x x .
    7    . x . x . . . x

    key  0 1 2 3 4 5 6 7     head 1 of 2
    0    x . . . . . . .
    1    x x . . . . . .
    2    . x x . . . . .
    3    x x . x . . . .
    4    . x . . x . . .
    5    . x . . x x . .
    6    . . x . . . x .
    7    . x . . . . . x

Random(blocks=1, block=2, seed=0):

    key  0 1 2 3 4 5 6 7
    0    x . . . . . . .
    1    x x . . . . . .
    2    . . x . . . . .
    3    . . x x . . . .
    4    . . . . x . . .
    5    . . . . x x . .
    6    x x . . . . x .
    7    x x . . . . . x
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .algebra import layer_of
from .base import Context, Pattern
from .checks import LARGEST_SEED, check_count
from .parts import Drawn, Part, window_part
from .registry import register_pattern
from .sampling import MOST_DRAWN, BlockDraw, is_drawn

_KEYS, _BLOCK = 64, 64


@register_pattern("random")
@dataclass(frozen=True)
class Random(Pattern):
    """The token itself, and keys drawn without replacement: causal from those up to it, else from the sequence."""

    keys_per_query: int = _KEYS  # keys drawn for each query; leave it alone where `blocks` is given
    blocks: int | None = None  # key blocks drawn for each block of queries, instead of single keys
    block: int = _BLOCK  # tokens of such a block
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("keys_per_query", self.keys_per_query, 1, MOST_DRAWN)
        check_count("block", self.block, 1)
        check_count("seed", self.seed, 0, LARGEST_SEED)
        if self.blocks is not None:
            check_count("blocks", self.blocks, 1, MOST_DRAWN)
            if self.keys_per_query != _KEYS:
                raise ValueError(
                    f"random draws single keys or blocks, got keys_per_query={self.keys_per_query} and "
                    f"blocks={self.blocks}; leave one out"
                )
        elif self.block != _BLOCK:
            raise ValueError(
                f"block is the size of drawn blocks, got block={self.block}; give blocks as well"
            )

    @property
    def per_layer(self) -> bool:
        return True

    def allows(self, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query == key) | is_drawn(self._drawn(context), head, query, key)

    def parts(self, context: Context) -> Sequence[Part]:
        return [window_part(1), Part(self._drawn(context))]

    def _drawn(self, context: Context) -> Drawn:
        size = 1 if self.blocks is None else self.block
        most = self.keys_per_query if self.blocks is None else self.blocks
        stop = None if context.length is None else -(-context.length // size)
        return Drawn(size, size, BlockDraw(self.seed, layer_of(context), most, stop=stop))
