"""Strided attention (the stride part of Sparse Transformer, Child et al., 2019, arXiv:1904.10509).

Strided(stride=3):

    key  0 1 2 3 4 5
    0    x . . . . .
    1    . x . . . .
    2    . . x . . .
    3    x . . x . .
    4    . x . . x .
    5    . . x . . x
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .base import Context, Pattern
from .checks import check_count
from .parts import Bound, Every, Part, Periodic, Residue
from .registry import register_pattern


@register_pattern("strided")
@dataclass(frozen=True)
class Strided(Pattern):
    """Every stride-th key, counted back from the query (relative) or from the start of the sequence (absolute)."""

    stride: int = 64  # tokens between two keys of a query
    anchor: str = (
        "relative"  # "relative": (q - k) % stride == 0; "absolute": k % stride == 0, and the token itself
    )

    def __post_init__(self) -> None:
        check_count("stride", self.stride, 1)
        if self.anchor not in ("relative", "absolute"):
            raise ValueError(f"anchor must be 'relative' or 'absolute', got {self.anchor!r}")

    def allows(self, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if self.anchor == "absolute":
            return (key % self.stride == 0) | (query == key)
        return (query - key) % self.stride == 0

    def parts(self, context: Context) -> Sequence[Part]:
        if self.anchor == "absolute":
            return [Part(Every(), start=Bound(0), stop=Bound(1)), Part(Periodic(self.stride))]
        return [Part(Residue(self.stride))]
