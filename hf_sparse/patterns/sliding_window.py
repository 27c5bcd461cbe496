"""Sliding-window (local) attention, as in Mistral, Gemma and Longformer (Beltagy et al., 2020, arXiv:2004.05150).

SlidingWindow(window=3):

    key  0 1 2 3 4 5
    0    x . . . . .
    1    x x . . . .
    2    x x x . . .
    3    . x x x . .
    4    . . x x x .
    5    . . . x x x
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .base import Context, Pattern
from .checks import check_count
from .parts import Part, window_part
from .registry import register_pattern


@register_pattern("sliding_window")
@dataclass(frozen=True)
class SlidingWindow(Pattern):
    """The nearest keys: ``|q - k| < window``."""

    window: int = 512  # keys each query sees, itself included; bidirectional: window - 1 to each side

    def __post_init__(self) -> None:
        check_count("window", self.window, 1)

    def allows(self, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query - key).abs() < self.window

    def parts(self, context: Context) -> Sequence[Part]:
        return [window_part(self.window)]
