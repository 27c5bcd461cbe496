"""As many blocks as the attention needs: the fewest whose estimated mass reaches a share, or all above a score.

A block's estimated mass is the softmax of the scaled scores of its representation over the blocks that may be selected,
those that are read anyway left out, for each query head; the query heads of a key head agree by the mean. Blocks are
taken in descending order while those before have less than `p`. With `above` it is every block whose scaled score, the
mean over the query heads, lies above that. The scale is D ** -0.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import pad

from ..patterns.registry import register_pattern
from .choose import QueryBlocks, best, masses
from .representations import REPRESENTATIONS, over_groups
from .topk_blocks import TopKBlocks


@register_pattern("threshold")
@dataclass(frozen=True)
class Threshold(TopKBlocks):
    """The blocks that hold most of the attention mass, by estimate."""

    takes_all_counted: ClassVar[bool] = False

    # blocks that a query reads at most, the kept ones included: a share, a number, or a list with one per layer
    keep: int | float | tuple[int | float, ...] = 1.0
    p: float | None = None  # share of the mass to be reached; None is 0.95, unless `above` is given
    above: float | None = None  # instead, the scaled score above which a block is read

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.above is None:
            object.__setattr__(self, "p", _checked_share(0.95 if self.p is None else self.p))
            return
        if self.p is not None:
            raise ValueError(
                f"p and above exclude each other, got p={self.p!r} and above={self.above!r}; give one of them"
            )
        if not _is_number(self.above) or not math.isfinite(self.above):
            raise ValueError(f"above must be a finite number such as 0.5, got {self.above!r}")

    def score_among(self, query: Tensor, blocks: Tensor, among: Tensor) -> Tensor:
        """Return estimated masses, or with `above` scaled scores, [R, H_kv, J, n]."""
        found = REPRESENTATIONS[self.represent].score(query[:, :, :, -1], blocks) * query.shape[-1] ** -0.5
        return over_groups(masses(found, among) if self.above is None else found, blocks.shape[1])

    def choose(self, scores: Tensor, blocks: QueryBlocks) -> Tensor:
        order = best(scores, blocks)
        held = scores.gather(3, order.clamp(min=0))
        if self.above is not None:
            return order.masked_fill_(~(held > self.above), -1)
        assert self.p is not None
        if self.p == 1:  # no block is without mass, though a rounded sum may reach 1 before the last
            return order
        before = pad(held, (1, 0)).cumsum(3)[..., :-1]
        return order.masked_fill_(before >= self.p, -1)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _checked_share(p: Any) -> float:
    if _is_number(p) and 0 < p <= 1:
        return float(p)
    raise ValueError(f"p must be a share of the mass above 0 and up to 1.0, got {p!r}; 0.95 is usual")
