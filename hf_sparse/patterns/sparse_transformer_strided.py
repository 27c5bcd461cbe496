"""Sparse Transformer, strided (Child et al., 2019, arXiv:1904.10509, section 4.3): a window, and every stride-th key.

The published code of the paper runs the stride part alone under this name; that is `strided`.

SparseTransformerStrided(stride=3):

    key  0 1 2 3 4 5 6 7
    0    x . . . . . . .
    1    x x . . . . . .
    2    x x x . . . . .
    3    x x x x . . . .
    4    . x x x x . . .
    5    . . x x x x . .
    6    x . . x x x x .
    7    . x . . x x x x

SparseTransformerStrided(stride=3, heads="split"):

    key  0 1 2 3 4 5 6 7     head 0 of 2
    0    x . . . . . . .
    1    x x . . . . . .
    2    x x x . . . . .
    3    . x x x . . . .
    4    . . x x x . . .
    5    . . . x x x . .
    6    . . . . x x x .
    7    . . . . . x x x

    key  0 1 2 3 4 5 6 7     head 1 of 2
    0    x . . . . . . .
    1    . x . . . . . .
    2    . . x . . . . .
    3    x . . x . . . .
    4    . x . . x . . .
    5    . . x . . x . .
    6    x . . x . . x .
    7    . x . . x . . x
"""

from __future__ import annotations

from dataclasses import dataclass

from .algebra import Spelled, check_halves, halves
from .base import Context, Pattern
from .checks import check_choice, check_count
from .registry import register_pattern
from .sliding_window import SlidingWindow
from .strided import Strided


@register_pattern("sparse_transformer_strided")
@dataclass(frozen=True)
class SparseTransformerStrided(Spelled):
    """A window, and every stride-th key: ``|q - k| < stride`` or ``(q - k) % stride == 0``."""

    stride: int = 128  # tokens of the window, and between two keys farther away
    heads: str = (
        "merged"  # "merged": every head sees both; "split": the first half the window, the rest the stride
    )

    def __post_init__(self) -> None:
        check_count("stride", self.stride, 1)
        check_choice("heads", self.heads, ("merged", "split"))

    def check_fit(self, heads: int, layers: int) -> None:
        if self.heads == "split":
            check_halves(self, heads)

    def spelled(self, context: Context) -> Pattern:
        window, stride = SlidingWindow(self.stride), Strided(self.stride)
        return window | stride if self.heads == "merged" else halves(context.heads, window, stride)
