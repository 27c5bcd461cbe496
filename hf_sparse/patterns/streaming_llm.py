"""StreamingLLM (Xiao et al., 2023, arXiv:2309.17453): attention sinks at the start, and a window.

StreamingLLM(sinks=1, window=2):

    key  0 1 2 3 4 5
    0    x . . . . .
    1    x x . . . .
    2    x x x . . .
    3    x . x x . .
    4    x . . x x .
    5    x . . . x x

StreamingLLM(sinks=1, window=2, positions="cache") scores these pairs at these distances:

    key  0 1 2 3 4 5
    0    0
    1    1 0
    2    2 1 0
    3    2 . 1 0
    4    2 . . 1 0
    5    2 . . . 1 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .base import Context, Pattern
from .checks import check_choice, check_count
from .parts import Bound, Every, Part, window_part
from .places import Place, Places
from .registry import register_pattern


@register_pattern("streaming_llm")
@dataclass(frozen=True)
class StreamingLLM(Pattern):
    """The first keys and a window: ``k < sinks`` or ``|q - k| < window``.

    With ``positions="absolute"`` keys keep the positions that they have in the text. With ``"cache"`` a causal model
    with rotary embeddings sees each token at its place among the tokens that are kept, as in the published code: sink k
    at place k, then the keys of the window, and the query last, at place ``min(q, sinks + window - 1)``. Within the
    window distances stay what they are in the text, and none exceeds ``sinks + window - 1``, however long the text.
    """

    sinks: int = 4  # first tokens of the sequence that every query sees
    window: int = 1020  # keys each query sees, itself included; bidirectional: window - 1 to each side
    positions: str = (
        "absolute"  # where tokens are seen: "absolute", in the text; "cache", among the tokens kept
    )

    def __post_init__(self) -> None:
        check_count("sinks", self.sinks, 0)
        check_count("window", self.window, 1)
        check_choice("positions", self.positions, ("absolute", "cache"))

    def allows(self, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key < self.sinks) | ((query - key).abs() < self.window)

    def parts(self, context: Context) -> Sequence[Part]:
        parts = [window_part(self.window)]
        if self.sinks:
            parts.append(Part(Every(), stop=Bound.fixed(self.sinks)))
        return parts

    def places(self, layer: int | None) -> Places | None:
        if self.positions == "absolute":
            return None
        return Places(self.window, query=Place(most=self.sinks + self.window - 1), key=Place())

    def __str__(self) -> str:
        positions = "" if self.positions == "absolute" else f", positions={self.positions!r}"
        return f"{self.name}(sinks={self.sinks}, window={self.window}{positions})"
