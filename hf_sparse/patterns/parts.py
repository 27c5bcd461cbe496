"""The words in which a pattern describes itself to the planner: intervals of keys on ordered lists of positions.

A part says "query q may attend to the keys of `keys` from position start(q) up to, not including, stop(q)". Parts know
nothing of lengths, causality or padding; the plan clips them and removes what they have in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from torch import Tensor

Position = TypeVar("Position", int, np.ndarray, Tensor)


@dataclass(frozen=True)
class Bound:
    """The position ``mul * ((q + add) // div) + const`` as a function of the query position q; never decreasing."""

    const: int = 0
    mul: int = 1
    add: int = 0
    div: int = 1

    def at(self, query: Position) -> Position:
        """Return the positions for query positions of any shape."""
        if self.div == 1:
            return self.mul * (query + self.add) + self.const
        return self.mul * ((query + self.add) // self.div) + self.const

    @staticmethod
    def fixed(position: int) -> Bound:
        return Bound(const=position, mul=0)


@dataclass(frozen=True)
class Every:
    """All positions."""


@dataclass(frozen=True)
class Residue:
    """The positions congruent to the query's own, modulo `stride`."""

    stride: int


@dataclass(frozen=True)
class Periodic:
    """The positions p with ``(p - offset) % period < width``: `width` neighbours in every period."""

    period: int
    offset: int = 0
    width: int = 1


@dataclass(frozen=True)
class Listed:
    """An explicit increasing list of positions."""

    positions: tuple[int, ...]


class Draw(Protocol):
    """Chooses the key blocks of query blocks; a frozen dataclass, so that equal draws share a plan."""

    def __call__(self, head: Tensor, block: Tensor) -> Tensor:
        """Return key block numbers, int64 [H, n, m], distinct in each list, -1 where a list is shorter.

        Args:
            head: query heads, int64 [H]; block: query block numbers, int64 [n].
        """
        ...


@dataclass(frozen=True)
class Drawn:
    """Blocks of `key_block` positions that `draw` gives each head and each block of `query_block` positions.

    Block b holds the positions from b * size up to (b + 1) * size. A drawn block may reach past the end of the sequence
    or, in causal models, past the query: the plan cuts it there.
    """

    query_block: int
    key_block: int
    draw: Draw


Keys = Every | Residue | Periodic | Listed | Drawn


@dataclass(frozen=True)
class Part:
    """Query q may attend to ``{k in keys : start(q) <= k < stop(q)}``; None is no bound.

    queries: the positions the part speaks of, None for all. Such a part must hold every key without a bound: it says
        all that those queries see, so every other part leaves them out.
    heads: the query heads it speaks of, ascending, None for all.
    """

    keys: Keys
    start: Bound | None = None
    stop: Bound | None = None
    queries: Listed | Periodic | None = None
    heads: tuple[int, ...] | None = None


def window_part(window: int, keys: Every | Residue = Every()) -> Part:
    """The part ``|q - k| < window``."""
    return Part(keys, start=Bound(1 - window), stop=Bound(window))


def block_part(
    block: int, before: int = 0, after: int = 0, shift: int = 0, heads: tuple[int, ...] | None = None
) -> Part:
    """The part of a query's own block of `block` positions, of `before` blocks before it and of `after` behind it.

    shift: how many positions earlier every block begins; the first one is then shorter.
    """
    return Part(
        Every(),
        start=Bound(-shift - before * block, mul=block, add=shift, div=block),
        stop=Bound((after + 1) * block - shift, mul=block, add=shift, div=block),
        heads=heads,
    )


def periodic(period: int, offset: int = 0, width: int = 1) -> Every | Periodic:
    """Return the positions of `Periodic`, or Every where the neighbours fill the period."""
    return Every() if width >= period else Periodic(period, offset, width)
