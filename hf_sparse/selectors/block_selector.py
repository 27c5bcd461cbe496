"""Selectors that score blocks of keys and read the best: what represents a block, and how a query scores that.

`query_block` queries share a selection, which the first of them makes from whole blocks that lie before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..patterns.base import Pattern
from ..patterns.checks import check_count, check_list_fits
from .blocks import ListSelector
from .choose import QueryBlocks, best
from .kept import KeptBlocks

if TYPE_CHECKING:
    from .block_index import BlockIndex

_ROUNDING = 1e-9  # 0.3 * 10 blocks are 3, not 4


@dataclass(frozen=True)
class BlockSelector(ListSelector):
    """A pattern that reads the best of the blocks of keys.

    A subclass says what represents a block and how a query scores that.
    """

    # blocks that a query reads in all, the kept ones included: a share of those up to it, or a number; a list gives
    # each layer its own
    keep: int | float | tuple[int | float, ...] = 0.125
    block: int = 64  # tokens per block of keys
    query_block: int | None = None  # queries that share what the first of them selects; None is `block`
    sinks: int = 1  # blocks at the beginning that are always kept
    local: int = 2  # blocks before a query's own that are always kept, as its own is
    dense_layers: int = 0  # layers at the bottom that read everything
    reuse: int = 1  # layers, one after the other, that share what the lowest of them selects

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", _checked_keep(self.keep))
        super().__post_init__()
        if self.query_block is not None:
            check_count("query_block", self.query_block, 1)
            if self.query_block > self.block and self.query_block % self.block:
                raise ValueError(
                    f"query_block must be at most block, or a multiple of it, got query_block={self.query_block} and "
                    f"block={self.block}; choose {self.query_block // self.block * self.block}"
                )

    @property
    def per_layer(self) -> bool:
        return super().per_layer or isinstance(self.keep, tuple)

    @property
    def queries(self) -> int:
        """Queries that share a selection."""
        return self.block if self.query_block is None else self.query_block

    @property
    def scores_per_block(self) -> int:
        """Numbers computed for one score of a query head; long sequences are scored part by part."""
        return 1

    @property
    def kept(self) -> KeptBlocks:
        """What is read whatever is selected."""
        grid = max(self.block, self.queries)
        return KeptBlocks(grid, self.before * self.block, self.sinks * self.block)

    @property
    def before(self) -> int:
        """Blocks before a query's own that are kept.

        One more than `local` where queries that share a selection may lie in two blocks: the later ones still see what
        the first of them found in its own.
        """
        return self.local + bool(self.block % self.queries and self.queries % self.block)

    def check_fit(self, heads: int, layers: int) -> None:
        if isinstance(self.keep, tuple):
            check_list_fits("keep", self.keep, "layer", layers)
        super().check_fit(heads, layers)

    def at_layer(self, layer: int) -> Pattern:
        """Return what one layer runs: this with its own budget, or dense attention."""
        own = super().at_layer(layer)
        if isinstance(self.keep, tuple) and isinstance(own, BlockSelector):
            return replace(own, keep=self.keep[layer])
        return own

    def index(self) -> BlockIndex:
        from .block_index import BlockIndex

        return BlockIndex(self)

    def wanted(self, seen: int) -> int:
        """Return how many of `seen` blocks, the query's own one included, are read."""
        assert not isinstance(self.keep, tuple), "each layer has its own"
        if isinstance(self.keep, float):
            return min(seen, max(1, math.ceil(self.keep * seen - _ROUNDING)))
        return min(seen, self.keep)

    def summarise(self, key: Tensor, query: Tensor) -> Tensor:
        """Return what represents blocks, [R, H_kv, n, ...].

        Args:
            key: [R, H_kv, n, block, D].
            query: [R, H, n, D], the last query of each block.
        """
        raise NotImplementedError(f"{type(self).__name__} must define summarise(key, query)")

    def score(self, query: Tensor, blocks: Tensor) -> Tensor:
        """Return how much queries want blocks, [R, H_kv or 1, J, n]: for each key head, or one for all of them.

        Args:
            query: [R, H, J, W, D], the `looks_back` latest queries when a block of queries begins, the first of them 0
                where there are fewer.
            blocks: [R, H_kv, n, ...] from `summarise`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define score(query, blocks)")

    def numbers_per_token(self, head_dim: int) -> float:
        key = torch.empty((1, 1, 1, self.block, head_dim), device="meta")
        return self.summarise(key, key[..., 0, :]).numel() / (self.block * self.queries)

    def score_among(self, query: Tensor, blocks: Tensor, among: Tensor) -> Tensor:
        """Return `score`; a selector whose score of a block depends on the others, as a share does, defines this.

        Args:
            among: bool [J, n], which blocks may be selected; what the score of another is does not matter.
        """
        return self.score(query, blocks)

    def choose(self, scores: Tensor, blocks: QueryBlocks) -> Tensor:
        """Return the numbers of the blocks that are read, int64 [R, G, J, m], -1 behind the last one of a list.

        Args:
            scores: [R, G, J, n] from `score_among`, G being 1 or the key heads; may be changed in place.
        """
        return best(scores, blocks)


def _checked_keep(keep: Any) -> float | int | tuple[float | int, ...]:
    if isinstance(keep, (list, tuple)):
        if not keep:
            raise ValueError("keep must be a share, a number of blocks, or a list with one per layer, got []")
        return tuple(_checked_budget(one) for one in keep)
    return _checked_budget(keep)


def _checked_budget(keep: Any) -> float | int:
    whole = isinstance(keep, int) and not isinstance(keep, bool)
    if whole and keep >= 1:
        return int(keep)
    if isinstance(keep, float) and 0 < keep <= 1:
        return keep
    raise ValueError(
        f"keep must be a share of the blocks above 0 and up to 1.0, or a whole number of blocks from 1 on, got {keep!r}"
    )
