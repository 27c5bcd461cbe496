"""Atrous attention with its gaps filled near the query: keys farther than the stride are every stride-th one only.

The same mask as `sparse_transformer_strided` with merged heads (Child et al., 2019, arXiv:1904.10509).

AtrousLocal(stride=3):

    key  0 1 2 3 4 5 6
    0    x . . . . . .
    1    x x . . . . .
    2    x x x . . . .
    3    x x x x . . .
    4    . x x x x . .
    5    . . x x x x .
    6    x . . x x x x
"""

from __future__ import annotations

from dataclasses import dataclass

from .algebra import Spelled
from .base import Context, Pattern
from .checks import check_count
from .registry import register_pattern
from .sliding_window import SlidingWindow
from .strided import Strided


@register_pattern("atrous_local")
@dataclass(frozen=True)
class AtrousLocal(Spelled):
    """The last stride keys, and every stride-th farther back: ``|q - k| < stride`` or ``(q - k) % stride == 0``."""

    stride: int = 64  # tokens of the window, and between two keys farther away

    def __post_init__(self) -> None:
        check_count("stride", self.stride, 1)

    def spelled(self, context: Context) -> Pattern:
        return SlidingWindow(self.stride) | Strided(self.stride)
