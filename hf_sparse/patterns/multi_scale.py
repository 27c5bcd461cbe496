"""Windows at several scales (LongNet, Ding et al., 2023, arXiv:2307.02486, is of this kind): dilations 1, 2, 4, ...

MultiScale(window=2, scales=3):

    key  0 1 2 3 4 5 6 7
    0    x . . . . . . .
    1    x x . . . . . .
    2    x x x . . . . .
    3    . x x x . . . .
    4    x . x x x . . .
    5    . x . x x x . .
    6    . . x . x x x .
    7    . . . x . x x x
"""

from __future__ import annotations

from dataclasses import dataclass

from .algebra import Spelled, Union
from .base import Context, Pattern
from .checks import check_count, check_product
from .dilated_window import DilatedWindow
from .registry import register_pattern


@register_pattern("multi_scale")
@dataclass(frozen=True)
class MultiScale(Spelled):
    """Windows at dilations 1, 2, 4, ...: at every scale i, ``|q - k| < window * 2**i`` and ``(q - k) % 2**i == 0``."""

    window: int = 128  # keys of each scale, the query itself included; bidirectional: window - 1 to each side
    scales: int = 4  # the dilations are 1, 2, 4, ... 2**(scales - 1)

    def __post_init__(self) -> None:
        check_count("window", self.window, 1)
        check_count("scales", self.scales, 1, 40)
        check_product("window * 2**(scales - 1)", self.window, 2 ** (self.scales - 1))

    def spelled(self, context: Context) -> Pattern:
        return Union.of(*(DilatedWindow(self.window, 2**scale) for scale in range(self.scales)))
