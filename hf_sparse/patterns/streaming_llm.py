"""StreamingLLM (Xiao et al., 2023, arXiv:2309.17453): attention sinks at the start, and a window.

StreamingLLM(sinks=1, window=2):

    key  0 1 2 3 4 5
    0    x . . . . .
    1    x x . . . .
    2    x x x . . .
    3    x . x x . .
    4    x . . x x .
    5    x . . . x x
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .base import Context, Pattern
from .checks import check_count
from .parts import Bound, Every, Part, window_part
from .registry import register_pattern


@register_pattern("streaming_llm")
@dataclass(frozen=True)
class StreamingLLM(Pattern):
    """The first keys and a window: ``k < sinks`` or ``|q - k| < window``.

    Keys keep the positions that they have in the text.
    """

    sinks: int = 4  # first tokens of the sequence that every query sees
    window: int = 1020  # keys each query sees, itself included; bidirectional: window - 1 to each side

    def __post_init__(self) -> None:
        check_count("sinks", self.sinks, 0)
        check_count("window", self.window, 1)

    def allows(self, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key < self.sinks) | ((query - key).abs() < self.window)

    def parts(self, context: Context) -> Sequence[Part]:
        parts = [window_part(self.window)]
        if self.sinks:
            parts.append(Part(Every(), stop=Bound.fixed(self.sinks)))
        return parts
