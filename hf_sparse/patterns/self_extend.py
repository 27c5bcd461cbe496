"""Self-extend (Jin et al., 2024, arXiv:2401.01325): far keys are seen at distances counted in groups of tokens.

The largest distance in a text of n tokens is about ``window + (n - window) / group``. A model trained on L tokens so
reads ``window + (L - window) * group``: 25,600 with the default options and L = 4,096.

SelfExtend(group=2, window=3) scores pairs at these distances:

    key  0 1 2 3 4 5 6 7
    0    0
    1    1 0
    2    2 1 0
    3    3 2 1 0
    4    4 4 2 1 0
    5    4 4 3 2 1 0
    6    5 5 4 4 2 1 0
    7    5 5 4 4 3 2 1 0

SelfExtend(group=2, window=3, pattern=Strided(2)):

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


@register_pattern("self_extend")
@dataclass(frozen=True)
class SelfExtend(Placed):
    """The keys of `pattern`, from `window` tokens on at the distance ``q // group - k // group + shift``.

    The shift ``window - window // group`` lets far distances go on where near ones end. For causal models with rotary
    embeddings.
    """

    group: int = 8  # tokens that share a place where they are far
    window: int = 1024  # tokens: keys nearer than this are seen at their own distance
    pattern: Pattern | str = (
        "full"  # which keys each query sees; an object, a name, or as pattern_to_json writes it
    )

    def __post_init__(self) -> None:
        check_count("group", self.group, 1)
        check_count("window", self.window, 1)
        super().__post_init__()

    def places(self, layer: int | None) -> Places:
        shift = self.window - self.window // self.group
        return Places(self.window, query=Place(div=self.group, const=shift), key=Place(div=self.group))
