"""The words in which a pattern describes itself to the planner: intervals of keys on ordered lists of positions.

A part says "query q may attend to the keys of `keys` from position start(q) up to, not including, stop(q)". Parts know
nothing of lengths, causality or padding; the plan clips them and removes what they have in common.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bound:
    """The position ``mul * ((q + add) // div) + const`` as a function of the query position q; never decreasing."""

    const: int = 0
    mul: int = 1
    add: int = 0
    div: int = 1

    def at(self, query: np.ndarray) -> np.ndarray:
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
    """The positions that are a multiple of `period`."""

    period: int


@dataclass(frozen=True)
class Listed:
    """An explicit increasing list of positions."""

    positions: tuple[int, ...]


Keys = Every | Residue | Periodic | Listed


@dataclass(frozen=True)
class Part:
    """Query q may attend to ``{k in keys : start(q) <= k < stop(q)}``; None is no bound.

    queries: the positions the part speaks of, None for all. A part for listed queries says all that those queries
        see, so every other part leaves them out.
    """

    keys: Keys
    start: Bound | None = None
    stop: Bound | None = None
    queries: tuple[int, ...] | None = None


def window_part(window: int) -> Part:
    """The part ``|q - k| < window``."""
    return Part(Every(), start=Bound(1 - window), stop=Bound(window))
