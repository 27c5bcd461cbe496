"""Heads in two groups: local ones with a window, global ones that see every k-th token of all.

GroupedHeads(local_heads=1, global_heads=1, window=2, global_token_ratio=0.25, adaptive_window=False):

    key  0 1 2 3 4 5 6     head 0 of 2
    0    x . . . . . .
    1    x x . . . . .
    2    . x x . . . .
    3    . . x x . . .
    4    . . . x x . .
    5    . . . . x x .
    6    . . . . . x x

    key  0 1 2 3 4 5 6     head 1 of 2
    0    x . . . . . .
    1    x x . . . . .
    2    x . x . . . .
    3    x . . x . . .
    4    x . . . x . .
    5    x . . . x x .
    6    x . . . x . x
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .algebra import PerHead, Spelled
from .base import Context, Pattern
from .checks import check_count, check_flag, check_ratio, period_of
from .registry import register_pattern
from .sliding_window import SlidingWindow
from .strided import Strided


@register_pattern("grouped_heads")
@dataclass(frozen=True)
class GroupedHeads(Spelled):
    """The first heads a window, ``|q - k| < window``; the rest every round(1 / global_token_ratio)-th key.

    The adaptive window is fixed when a model is patched with ``seq_len=``: window * sqrt(seq_len / window), rounded
    down, within min_window and max_window. Without ``seq_len=`` it is `window`.
    """

    local_heads: int | None = None  # query heads; None: the others, or round(2 / 3 of all)
    global_heads: int | None = None  # query heads; None: the others
    window: int = (
        128  # keys a local head sees, the query itself included; bidirectional: window - 1 to each side
    )
    global_token_ratio: float = 0.1
    adaptive_window: bool = True
    min_window: int = 32
    max_window: int = 512

    def __post_init__(self) -> None:
        for name in ("local_heads", "global_heads"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 0)
        check_count("window", self.window, 1)
        check_ratio("global_token_ratio", self.global_token_ratio)
        check_flag("adaptive_window", self.adaptive_window)
        check_count("min_window", self.min_window, 1)
        check_count("max_window", self.max_window, 1)
        if self.min_window > self.max_window:
            raise ValueError(
                f"min_window must be at most max_window, got min_window={self.min_window} and "
                f"max_window={self.max_window}"
            )

    def check_fit(self, heads: int, layers: int) -> None:
        counts = [count for count in (self.local_heads, self.global_heads) if count is not None]
        if sum(counts) > heads or (len(counts) == 2 and sum(counts) != heads):
            raise ValueError(
                f"local_heads={self.local_heads} and global_heads={self.global_heads} do not add up to the {heads} "
                f"query heads of the model; leave one out to give it the rest"
            )

    def resolve(self, seq_len: int) -> GroupedHeads:
        if not self.adaptive_window:
            return self
        adapted = int(self.window * math.sqrt(seq_len / self.window))
        window = min(max(adapted, self.min_window), self.max_window)
        return replace(self, window=window, adaptive_window=False)

    def spelled(self, context: Context) -> Pattern:
        heads = context.heads
        if self.local_heads is not None:
            local = min(self.local_heads, heads)
        elif self.global_heads is not None:
            local = max(heads - self.global_heads, 0)
        else:
            local = round(2 * heads / 3)
        window = SlidingWindow(self.window)
        columns = Strided(period_of(self.global_token_ratio), anchor="absolute")
        return PerHead((window,) * local + (columns,) * (heads - local))
