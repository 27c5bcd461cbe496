"""At which distance a pair is seen: the rotary position of a far key need not be its place in the text.

Keys closer than `near` tokens are always seen at their own distance. Of farther ones a pattern may say at which place
the query and at which the key is to be seen; a model with rotary embeddings then scores the pair as if it had been
computed there. StreamingLLM with places in the cache, ReRoPE and self-extend are three such rules.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_count


@dataclass(frozen=True)
class Place:
    """The place ``min(mul * (p // div) + const, most)`` of the token at position p; no limit where `most` is None."""

    mul: int = 1
    div: int = 1
    const: int = 0
    most: int | None = None

    def __post_init__(self) -> None:
        check_count("mul", self.mul, 0)
        check_count("div", self.div, 1)
        check_count("const", self.const, 0)
        if self.most is not None:
            check_count("most", self.most, 0)

    def at(self, position: Tensor) -> Tensor:
        """Return the places, int64, of positions of any shape."""
        place = self.mul * (position // self.div) + self.const
        return place if self.most is None else torch.clamp(place, max=self.most)


@dataclass(frozen=True)
class Places:
    """A key `near` or more tokens before its query is scored at the distance ``query.at(q) - key.at(k)``."""

    near: int
    query: Place
    key: Place

    def __post_init__(self) -> None:
        check_count("near", self.near, 1)

    def distance(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the distance, int64, at which pairs of positions are scored; broadcasts."""
        return torch.where(query - key < self.near, query - key, self.query.at(query) - self.key.at(key))
