"""BigBird (Zaheer et al., 2020, arXiv:2007.14062): a window of blocks, global blocks at the ends, and random blocks.

BigBird(block=1, window_blocks=3, global_blocks=2, random_blocks=1, seed=0):

    key  0 1 2 3 4 5 6 7 8
    0    x . . . . . . . .
    1    x x . . . . . . .
    2    x x x . . . . . .
    3    x x x x . . . . .
    4    x x x x x . . . .
    5    x x x x x x . . .
    6    x x . x x x x . .
    7    x x . . x x x x .
    8    x x . x . . x x x

    key  0 1 2 3 4 5 6 7 8     bidirectional
    0    x x x x x x x x x
    1    x x x . . x . . x
    2    x x x x . . x . x
    3    x x x x x . . . x
    4    x x . x x x . . x
    5    x . x . x x x . x
    6    x . x . . x x x x
    7    x . . x . . x x x
    8    x x x x x x x x x
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .algebra import layer_of
from .base import Context, Pattern
from .checks import LARGEST_SEED, check_count, check_product
from .parts import Bound, Draw, Drawn, Every, Listed, Part, block_part
from .registry import register_pattern
from .sampling import MOST_DRAWN, BlockDraw, is_drawn


@register_pattern("bigbird")
@dataclass(frozen=True)
class BigBird(Pattern):
    """Blocks near the query's own, global blocks, and for every query block and head random ones among the rest.

    Causal: the window is the query's own block and those before it, and every query sees the first `global_blocks`.
    Bidirectional: the window reaches to both sides; of the global blocks, half (rounded up) are the first and half
    (rounded down) the last of the sequence, and their queries see everything.
    Random blocks are fewer where fewer are left.
    """

    block: int = 64  # tokens
    window_blocks: int = 3  # blocks of the window, the query's own included; bidirectional: an odd number
    global_blocks: int = 2
    random_blocks: int = 3  # for each block of queries and each head
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("block", self.block, 1)
        check_count("window_blocks", self.window_blocks, 1)
        check_count("global_blocks", self.global_blocks, 0)
        check_count("random_blocks", self.random_blocks, 0, MOST_DRAWN)
        check_count("seed", self.seed, 0, LARGEST_SEED)
        check_product("block * window_blocks", self.block, self.window_blocks)
        check_product("block * global_blocks", self.block, self.global_blocks)

    @property
    def per_layer(self) -> bool:
        return self.random_blocks > 0

    def resolve(self, seq_len: int) -> BigBird:
        blocks = -(-seq_len // self.block)
        if self.global_blocks > blocks:
            raise ValueError(
                f"global_blocks={self.global_blocks} is more than the {blocks} block{'s' * (blocks > 1)} of "
                f"block={self.block} in seq_len={seq_len} tokens; make global_blocks or block smaller"
            )
        return self

    def draw(self, context: Context) -> Draw:
        """Return what chooses the random blocks of a call."""
        before, after = self._reach(context)
        first, last = self._ends(context)
        # Blocks of the window are left out; causal ones end before it, so that the own block is the limit.
        stop = None if context.length is None else last
        return BlockDraw(
            self.seed, layer_of(context), self.random_blocks, first, stop, before=before, after=after + 1
        )

    def allows(self, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        before, after = self._reach(context)
        first, last = self._ends(context)
        q_block, k_block = query // self.block, key // self.block
        allowed = (q_block - k_block <= before) & (k_block - q_block <= after)
        allowed = allowed | (k_block < first)
        if last is not None:
            allowed = allowed | (k_block >= last) | (q_block < first) | (q_block >= last)
        return allowed | is_drawn(self._drawn(context), head, query, key) if self.random_blocks else allowed

    def parts(self, context: Context) -> Sequence[Part]:
        before, after = self._reach(context)
        first, last = self._ends(context)
        parts = [block_part(self.block, before, after)]
        if first:
            parts.append(Part(Every(), stop=Bound.fixed(first * self.block)))
        if last is not None:
            assert context.length is not None
            tail = min(last * self.block, context.length)
            if tail < context.length:
                parts.append(Part(Every(), start=Bound.fixed(tail)))
            ends = (*range(min(first * self.block, tail)), *range(tail, context.length))
            if ends:
                parts.append(Part(Every(), queries=Listed(ends)))
        if self.random_blocks:
            parts.append(Part(self._drawn(context)))
        return parts

    def _drawn(self, context: Context) -> Drawn:
        return Drawn(self.block, self.block, self.draw(context))

    def _reach(self, context: Context) -> tuple[int, int]:
        """Return how many blocks before and behind a query's own its window holds."""
        if context.causal:
            return self.window_blocks - 1, 0
        if self.window_blocks % 2 == 0:
            raise ValueError(
                f"window_blocks must be odd in a bidirectional model, as many to each side of the own block, got "
                f"{self.window_blocks}; use {self.window_blocks + 1}"
            )
        return self.window_blocks // 2, self.window_blocks // 2

    def _ends(self, context: Context) -> tuple[int, int | None]:
        """Return how many first blocks are global, and from which block on the last ones are (None: causal)."""
        if context.causal:
            return self.global_blocks, None
        assert context.length is not None, "a bidirectional call always knows its length"
        blocks = -(-context.length // self.block)
        first = min(-(-self.global_blocks // 2), blocks)
        return first, max(blocks - self.global_blocks // 2, first)
