"""ReRoPE (Su, 2023, https://github.com/bojone/rerope): every far key is seen at one distance, the window.

A model then meets no distance that it was not trained on, however long the text: choose `window` below the length
that it was trained on. The published code besides scales queries by the logarithm of their position; this does not.

ReRoPE(window=3) scores pairs at these distances:

    key  0 1 2 3 4 5
    0    0
    1    1 0
    2    2 1 0
    3    3 2 1 0
    4    3 3 2 1 0
    5    3 3 3 2 1 0

ReRoPE(window=3, pattern=Strided(2)):

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

from .base import Pattern
from .checks import check_count
from .placed import Placed
from .places import Place, Places
from .registry import register_pattern


@register_pattern("rerope")
@dataclass(frozen=True)
class ReRoPE(Placed):
    """The keys of `pattern`, at the distance ``min(q - k, window)``; for causal models with rotary embeddings."""

    window: int = 512  # tokens: the largest distance that the model meets
    pattern: Pattern | str = (
        "full"  # which keys each query sees; an object, a name, or as pattern_to_json writes it
    )

    def __post_init__(self) -> None:
        check_count("window", self.window, 1)
        super().__post_init__()

    def places(self, layer: int | None) -> Places:
        return Places(self.window, query=Place(mul=0, const=self.window), key=Place(mul=0))
