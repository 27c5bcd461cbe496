"""Atrous attention: every stride-th key, counted back from the query; `strided` under its other name.

Atrous(stride=2):

    key  0 1 2 3 4 5
    0    x . . . . .
    1    . x . . . .
    2    x . x . . .
    3    . x . x . .
    4    x . x . x .
    5    . x . x . x
"""

from __future__ import annotations

from dataclasses import dataclass

from .algebra import Spelled
from .base import Context, Pattern
from .checks import check_count
from .registry import register_pattern
from .strided import Strided


@register_pattern("atrous")
@dataclass(frozen=True)
class Atrous(Spelled):
    """Every stride-th key back from the query: ``(q - k) % stride == 0``."""

    stride: int = 64  # tokens between two keys of a query

    def __post_init__(self) -> None:
        check_count("stride", self.stride, 1)

    def spelled(self, context: Context) -> Pattern:
        return Strided(self.stride)
