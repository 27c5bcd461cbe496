"""Dense attention as a pattern: the end of every scale, and the tool for leaving layers as they are.

Full():

    key  0 1 2 3 4 5
    0    x . . . . .
    1    x x . . . .
    2    x x x . . .
    3    x x x x . .
    4    x x x x x .
    5    x x x x x x
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Context, Pattern
from .parts import Every, Part
from .registry import register_pattern


@register_pattern("full")
@dataclass(frozen=True)
class Full(Pattern):
    """Every key."""

    def allows(self, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.ones_like(query == key)

    def parts(self, context: Context) -> Sequence[Part]:
        return [Part(Every())]
