"""Vertical-slash attention of MInference (Jiang et al., 2024, arXiv:2407.02490): columns and diagonals of blocks.

A few queries look at every key, and the weights of their softmax say where the others look: at columns, keys that all
queries want, and along diagonals, keys at a distance that all queries want. The weights of the last 64 queries are
summed over the keys of each block (a column) and over pairs of blocks at each distance (a diagonal), and averaged over
the query heads of a key head. A block of queries reads the best columns and what the best diagonals give it.

The publication takes single columns and diagonals, of which the first 30 and the last 100 always; here they are whole
blocks, of which the first and those around the query's own are always kept. It lets the last 64 queries of a prompt
decide for all: ``selection="prompt"`` does so for the prompt of a generation. Otherwise queries decide for those after
them, anew every `renew` tokens, and before so many whenever the text has doubled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..patterns.checks import check_count
from ..patterns.registry import register_pattern
from .blocks import ListSelector

if TYPE_CHECKING:
    from .estimate_index import EstimateIndex

_LONG = 131_072  # tokens for which MInference gives its numbers of columns and diagonals
_ROUNDING = 1e-9  # 0.3 * 10 blocks are 3, not 4


@register_pattern("vertical_slash")
@dataclass(frozen=True)
class VerticalSlash(ListSelector):
    """The columns and the diagonals that get the most attention from the last queries."""

    looks_back: ClassVar[int] = 64
    takes_all_counted: ClassVar[bool] = False  # a block may lie in a column and on a diagonal

    # tokens in columns and on diagonals, those always kept not counted: a number, of which texts shorter than 131,072
    # tokens take the same share, or a share of the tokens before
    vertical: int | float = 1000
    slash: int | float = 6096
    block: int = 64  # tokens per block of keys and of queries
    renew: int = 1024  # tokens after which columns and diagonals are estimated anew; a multiple of block
    sinks: int = 1  # blocks at the beginning that are always kept
    local: int = 2  # blocks before a query's own that are always kept, as its own is
    dense_layers: int = 0  # layers at the bottom that read everything
    reuse: int = 1  # layers, one after the other, that share what the lowest of them selects
    selection: str = "causal"  # or "prompt": the last queries of a generation's prompt decide for all of it

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vertical", "slash"):
            _check_share(name, getattr(self, name))
        check_count("renew", self.renew, 1)
        if self.renew % self.block:
            raise ValueError(
                f"renew must be a multiple of block={self.block}, got {self.renew}; choose "
                f"{max(1, self.renew // self.block) * self.block}"
            )

    def wanted(self, seen: int) -> int:
        always = self.sinks + self.before + 1
        return min(seen, always + self.columns(seen) + self.diagonals(seen))

    def columns(self, seen: int) -> int:
        """Return how many of `seen` blocks are read as columns."""
        return self._blocks(self.vertical, seen)

    def diagonals(self, seen: int) -> int:
        """Return how many diagonals through `seen` blocks are read."""
        return self._blocks(self.slash, seen)

    def estimated_at(self, begin: int, end: int) -> list[int]:
        """Return the positions begin .. end of which the queries up to them estimate columns and diagonals."""
        doubled = [0, *(self.block << i for i in range((self.renew // self.block).bit_length()))]
        early = [at for at in doubled if begin <= at < min(end, self.renew)]
        return [*early, *range(max(1, -(-begin // self.renew)) * self.renew, end, self.renew)]

    def _blocks(self, given: int | float, seen: int) -> int:
        tokens = seen * self.block
        share = given if isinstance(given, float) else given / max(tokens, _LONG)
        return math.ceil(share * seen - _ROUNDING)

    def numbers_per_token(self, head_dim: int) -> float:
        return head_dim / self.renew

    def index(self) -> EstimateIndex:
        from .estimate_index import EstimateIndex

        return EstimateIndex(self)


def _check_share(name: str, given: Any) -> None:
    if isinstance(given, int) and not isinstance(given, bool) and given >= 0:
        return
    if isinstance(given, float) and 0 <= given <= 1:
        return
    raise ValueError(
        f"{name} must be a whole number of tokens from 0 on, or a share of them from 0.0 to 1.0, got {given!r}"
    )
