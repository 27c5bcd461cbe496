"""Which keys later queries may still see: what a cache has to hold, read off a pattern's parts."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch

from ..patterns.base import Context, Pattern
from ..patterns.parts import Drawn, Every, Listed, Part, Periodic, Residue
from .constraint import Constraint
from .intervals import is_in

_LATER = 2**40  # a position that no text reaches


@dataclass(frozen=True)
class Retention:
    """What a causal sequence's later queries may see, in any of its heads or any of some.

    The answer for queries from position n on is a tail of successive positions up to n, and of earlier ones those that
    `keeps` names. It holds at least every key that can still be seen and, but for keys of the tail, no other.

    heads: query heads of the layer.
    chosen: positions that are global in this sequence.
    only: the query heads that count; None for all.
    """

    pattern: Pattern
    constraint: Constraint
    heads: int
    layer: int = 0
    chosen: tuple[int, ...] = ()
    only: tuple[int, ...] | None = None

    def tail(self, n: int) -> int:
        """Return the first position from which on every key may still be seen, or is new, by queries >= n."""
        if self._parts is None:
            return 0
        low = min((_reach(part, n) for part in self._parts if _is_tail(part)), default=n)
        return max(low, self._floor(n))

    def keeps(self, positions: np.ndarray, n: int) -> np.ndarray:
        """Tell which of the positions [m] int64, all before the tail, queries >= n may still see."""
        kept = np.zeros(len(positions), dtype=bool)
        for part in self._parts or ():
            if _speaks_later(part, n) and not _is_tail(part):
                low, high = (-1 if part.start is None else part.start.at(n)), _end(part)
                kept |= _on_list(part, positions) & (positions >= low) & (positions < high)
        return kept & (positions >= self._floor(n))

    @property
    def is_bounded(self) -> bool:
        """True where keys may ever be dropped."""
        return self.tail(_LATER) > 0

    @cached_property
    def key(self) -> Hashable:
        """The same for retentions that always tell the same, as far as their parts show it; None: every key stays."""
        if self._parts is None or not self.is_bounded:
            return None
        return frozenset(self._bare(part) for part in self._parts), self.constraint

    @cached_property
    def counts(self) -> dict[int, int]:
        """What `keys_held` has found before."""
        return {}

    @cached_property
    def _parts(self) -> tuple[Part, ...] | None:
        """The parts, or None where every key may always be seen again: a bare predicate does not say."""
        # A token that is yet to come may be chosen too, and may then be a query that sees everything.
        chosen = (*self.chosen, _LATER) if self.pattern.takes_globals else ()
        context = self.constraint.context(
            self.pattern, layer=self.layer, heads=self.heads, length=0, chosen=chosen
        )
        parts = _parts(self.pattern, context)
        if parts is None or self.only is None:
            return parts
        return tuple(p for p in parts if p.heads is None or not set(self.only).isdisjoint(p.heads))

    def _bare(self, part: Part) -> Part:
        """Return a part without what says nothing of later queries: heads, moving ends, starts the model hides."""
        stop = None if part.stop is None or part.stop.mul else part.stop
        start, window = part.start, self.constraint.window
        if start is not None and window is not None and (start.mul, start.div) == (1, 1):
            start = None if start.at(0) <= 1 - window else start
        return replace(part, start=start, stop=stop, heads=None)

    def _floor(self, n: int) -> int:
        """Return the first position that the model's own window and chunks leave to queries >= n."""
        starts, _ = self.constraint.bounds()
        return max([0, *(bound.at(n) for bound in starts)])


@dataclass(frozen=True)
class KeyGroup:
    """Key heads of a layer of which a cache holds the same.

    kv_heads: key heads, ascending.
    only: their query heads, as `Retention` takes them; None for all of the layer.
    retention: what their queries may still see, where no position is global.
    """

    kv_heads: tuple[int, ...]
    only: tuple[int, ...] | None
    retention: Retention


@lru_cache(maxsize=4096)
def key_groups(
    pattern: Pattern, constraint: Constraint, heads: int, kv_heads: int, layer: int = 0
) -> tuple[KeyGroup, ...]:
    """Return the key heads of a layer in groups of equal retention, that of the first head first."""
    sharing = heads // kv_heads
    found: dict[Hashable, list[int]] = {}
    for kv in range(kv_heads):
        own = Retention(pattern, constraint, heads, layer, only=_sharers((kv,), sharing))
        found.setdefault(own.key, []).append(kv)
    groups = []
    for numbers in map(tuple, found.values()):
        only = None if len(found) == 1 else _sharers(numbers, sharing)
        retention = Retention(pattern, constraint, heads, layer, only=only)
        groups.append(KeyGroup(numbers, only, retention))
    return tuple(groups)


def keys_held(retention: Retention, n: int) -> int:
    """Return how many of `n` tokens stay, where none is global by the call."""
    if n not in retention.counts:
        tail = retention.tail(n)
        retention.counts[n] = n - tail + int(retention.keeps(np.arange(tail), n).sum())
    return retention.counts[n]


def _sharers(kv_heads: tuple[int, ...], sharing: int) -> tuple[int, ...]:
    """Return the query heads of these key heads, each shared by so many."""
    return tuple(kv * sharing + i for kv in kv_heads for i in range(sharing))


@lru_cache(maxsize=256)
def _parts(pattern: Pattern, context: Context) -> tuple[Part, ...] | None:
    parts = pattern.parts(context)
    return None if parts is None else tuple(parts)


def _is_tail(part: Part) -> bool:
    """True where a part goes on to add new keys wherever they lie: all from its start on have to be held."""
    if part.queries is not None:  # such a part holds every key
        return True
    return isinstance(part.keys, (Residue, Drawn)) or (isinstance(part.keys, Every) and _end(part) == np.inf)


def _reach(part: Part, n: int) -> int:
    """Return the first position that a part of the tail shows to queries >= n."""
    if not _speaks_later(part, n):
        return n
    if part.start is None or part.queries is not None or isinstance(part.keys, Drawn):
        return 0
    low = max(part.start.at(n), 0)
    if isinstance(part.keys, Residue) and part.start.div == 1:
        stride = part.keys.stride
        # Where the next query on its residue sees the first key no more, the first one that query n sees comes first.
        if part.start.at(n + (low - n) % stride) > low:
            low += (n - low) % stride
    return min(low, n)


def _speaks_later(part: Part, n: int) -> bool:
    """True where a part speaks of any query >= n."""
    return not isinstance(part.queries, Listed) or any(q >= n for q in part.queries.positions)


def _end(part: Part) -> float:
    """Return one past the last position that a part ever shows."""
    return np.inf if part.stop is None or part.stop.mul else part.stop.const


def _on_list(part: Part, positions: np.ndarray) -> np.ndarray:
    if isinstance(part.keys, Every):
        return np.ones(len(positions), dtype=bool)
    assert isinstance(part.keys, (Listed, Periodic))
    return is_in(part.keys, torch.from_numpy(positions)).numpy()
