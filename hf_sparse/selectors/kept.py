"""What content-based patterns read whatever they select: sinks, the query's own block and those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..patterns.base import Context, Pattern
from ..patterns.parts import Bound, Every, Part


@dataclass(frozen=True)
class KeptBlocks(Pattern):
    """The first `sinks` tokens, and from `before` tokens before the query's block of `block` tokens on everything.

    Made for a call, never saved. Bidirectional: as many tokens behind the query's block too.
    """

    block: int
    before: int
    sinks: int

    def allows(self, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = query // self.block * self.block
        near = (key >= own - self.before) & (key < own + self.block + self.before)
        return near | (key < self.sinks)

    def parts(self, context: Context) -> Sequence[Part]:
        start = Bound(-self.before, mul=self.block, div=self.block)
        stop = Bound(self.block + self.before, mul=self.block, div=self.block)
        near = Part(Every(), start=start, stop=stop)
        return [near, Part(Every(), stop=Bound.fixed(self.sinks))] if self.sinks else [near]


@dataclass(frozen=True)
class Nothing(Pattern):
    """No pair at all, of what reads nothing but what is selected. Made for a call, never saved."""

    sees_itself: ClassVar[bool] = False

    def allows(self, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query != query) & (key != key)

    def parts(self, context: Context) -> Sequence[Part]:
        return []
