"""Longformer (Beltagy et al., 2020, arXiv:2004.05150): a window, and global tokens.

Besides `global_tokens`, the positions where the `global_attention_mask` given to `forward` is 1 are global.

Longformer(window=2, global_tokens=(0,)):

    key  0 1 2 3 4 5
    0    x . . . . .
    1    x x . . . .
    2    x x x . . .
    3    x . x x . .
    4    x . . x x .
    5    x . . . x x

Bidirectional, as in the paper, the global tokens also see everything:

    key  0 1 2 3 4 5     bidirectional
    0    x x x x x x
    1    x x x . . .
    2    x x x x . .
    3    x . x x x .
    4    x . . x x x
    5    x . . . x x

Longformer(window=(2, 3), global_tokens=(1,), dilation=(1, 2)):

    key  0 1 2 3 4 5     layer 0, head 0 of 2
    0    x . . . . .
    1    x x . . . .
    2    . x x . . .
    3    . x x x . .
    4    . x . x x .
    5    . x . . x x

    key  0 1 2 3 4 5     layer 1, head 1 of 2
    0    x . . . . .
    1    . x . . . .
    2    x x x . . .
    3    . x . x . .
    4    x x x . x .
    5    . x . x . x
"""

from __future__ import annotations

from dataclasses import dataclass

from .algebra import Spelled, layer_of
from .base import Context, Pattern
from .checks import check_counts, check_flag, check_list_fits, check_positions
from .dilated_window import DilatedWindow
from .global_tokens import GlobalTokens
from .registry import register_pattern
from .sliding_window import SlidingWindow


@register_pattern("longformer")
@dataclass(frozen=True)
class Longformer(Spelled):
    """A window, and the global keys for every query; bidirectional: every key for the global queries."""

    window: int | tuple[int, ...] = 512  # keys each query sees, itself included: one number, or one per layer
    global_tokens: tuple[int, ...] = (0,)  # positions that every query sees
    dilation: int | tuple[int, ...] = (
        1  # tokens between two keys of the window: one number, or one per query head
    )
    global_projections: bool = (
        False  # queries at global positions, and what they see, get weights of their own
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", check_counts("window", self.window, "layer"))
        object.__setattr__(self, "global_tokens", check_positions("global_tokens", self.global_tokens))
        object.__setattr__(self, "dilation", check_counts("dilation", self.dilation, "query head"))
        check_flag("global_projections", self.global_projections)
        self._near(max(self.window) if isinstance(self.window, tuple) else self.window)

    @property
    def per_layer(self) -> bool:
        return isinstance(self.window, tuple)

    @property
    def takes_globals(self) -> bool:
        return True

    def check_fit(self, heads: int, layers: int) -> None:
        if isinstance(self.window, tuple):
            check_list_fits("window", self.window, "layer", layers)
        if isinstance(self.dilation, tuple):
            check_list_fits("dilation", self.dilation, "query head", heads)

    def spelled(self, context: Context) -> Pattern:
        window = self.window
        if isinstance(window, tuple):
            layer = layer_of(context)
            if layer >= len(window):
                check_list_fits("window", window, "layer", layer + 1)
            window = window[layer]
        return self._near(window) | GlobalTokens(self.global_tokens)

    def _near(self, window: int) -> Pattern:
        return SlidingWindow(window) if self.dilation == 1 else DilatedWindow(window, self.dilation)
