"""The account of what a group of cache layers holds: those of which later tokens may see the same keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from torch import Tensor

from ..patterns import Pattern
from ..plan import Constraint
from ..plan.held import SLACK, Held, Step, drop, next_step, take_back, take_rows
from ..plan.retention import Retention

_retention = lru_cache(maxsize=256)(Retention)


@dataclass(eq=False)
class Account:
    """Which keys the layers of one group hold between calls, and what the call in progress does to them.

    heads: query heads of the layers; layer: the index of the first of them.
    only: the query heads that count, where those of a layer differ in what they may see; None for all.
    held: None before the first call.
    step: the call in progress, None between calls.
    shift: rotary positions by which the call in progress turns the keys of every tail.
    """

    pattern: Pattern
    constraint: Constraint
    heads: int
    layer: int
    only: tuple[int, ...] | None = None
    held: Held | None = None
    step: Step | None = None
    shift: int = 0

    @cached_property
    def is_bounded(self) -> bool:
        """True where the layers ever drop a key."""
        return self._retention(()).is_bounded

    def begin(
        self,
        batch: int,
        q_len: int,
        real: np.ndarray | None,
        chosen: np.ndarray | None,
        record: bool,
        shift: int,
    ) -> Step:
        """Begin a call of `q_len` tokens in each of `batch` rows; see `hf_sparse.plan.held.next_step`."""
        held = Held.nothing(batch) if self.held is None else self.held
        self.shift = shift
        self.step = next_step(held, q_len, self._retention, real=real, chosen=chosen, record=record)
        return self.step

    def end(self, done: bool) -> None:
        """End the call; it counts where the layers have its keys."""
        if self.step is not None and done:
            self.held = self.step.after
        self.step, self.shift = None, 0

    def crop(self, count: int) -> None:
        """Take the last `count` slots back; ValueError where that is no longer possible."""
        if self.held is not None:
            self.held = take_back(self.held, count)

    def trim(self) -> Tensor | None:
        """Drop what came to be of no use while tokens were recorded, and return the slots that stay; None for all."""
        if self.held is None:
            return None
        after, kept = drop(self.held.segments, self._retention)
        if kept is None or self.held.length - after.k_len <= SLACK:
            return None
        self.held = Held(after, after.k_len + SLACK)
        return kept

    def select(self, rows: list[int]) -> None:
        """Make row i what row ``rows[i]`` was."""
        if self.held is not None:
            self.held = take_rows(self.held, rows)

    def reset(self) -> None:
        self.held, self.step, self.shift = None, None, 0

    def _retention(self, chosen: tuple[int, ...]) -> Retention:
        return _retention(self.pattern, self.constraint, self.heads, self.layer, chosen, self.only)
