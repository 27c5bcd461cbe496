"""Attention sinks alone (StreamingLLM, Xiao et al., 2023, arXiv:2309.17453): the first tokens, a part for unions.

Sinks(sinks=2):

    key  0 1 2 3 4 5
    0    x . . . . .
    1    x x . . . .
    2    x x x . . .
    3    x x . x . .
    4    x x . . x .
    5    x x . . . x
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .base import Context, Pattern
from .checks import check_count
from .parts import Bound, Every, Part, window_part
from .registry import register_pattern


@register_pattern("sinks")
@dataclass(frozen=True)
class Sinks(Pattern):
    """The token itself and the first keys: ``k < sinks``. ``Sinks(4) | SlidingWindow(1020)`` is StreamingLLM's mask."""

    sinks: int = 4  # first tokens of the sequence that every query sees

    def __post_init__(self) -> None:
        check_count("sinks", self.sinks, 1)

    def allows(self, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query == key) | (key < self.sinks)

    def parts(self, context: Context) -> Sequence[Part]:
        return [window_part(1), Part(Every(), stop=Bound.fixed(self.sinks))]
