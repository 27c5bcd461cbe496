"""From the parts of a pattern to disjoint intervals: what two parts have in common is kept in one of them only.

A part minus an earlier one is again one or two intervals wherever its keys all lie on the earlier part's list. What is
left over otherwise (two coprime strides, drawn blocks) is given back to be planned as tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..patterns.parts import Bound, Drawn, Every, Keys, Listed, Part, Periodic, Residue
from ..patterns.sampling import is_drawn

_LARGEST_COMMON_PERIOD = 2**16  # up to which two periodic lists are compared position by position


@dataclass(frozen=True)
class Interval:
    """Query q sees ``{k in keys : max(starts)(q) <= k < min(stops)(q)}``; no bound where a tuple is empty.

    queries: the only positions it speaks of, None for all but those of `skip`.
    skip: positions it says nothing of.
    """

    keys: Keys
    starts: tuple[Bound, ...] = ()
    stops: tuple[Bound, ...] = ()
    queries: Listed | Periodic | None = None
    skip: tuple[Listed | Periodic, ...] = ()


@dataclass(frozen=True)
class Leftover:
    """The pairs of `interval` that none of `earlier` holds; drawn blocks are always left over."""

    interval: Interval
    earlier: tuple[Interval, ...] = ()

    def allowed(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Tell which pairs (int64, broadcastable) are meant; of the blocks that the interval itself draws, all are."""
        allowed = inside(self.interval, query, key)
        for other in self.earlier:
            held = inside(other, query, key)
            if isinstance(other.keys, Drawn):
                held = held & is_drawn(other.keys, head, query, key)
            allowed = allowed & ~held
        return allowed


def disjoint(parts: Sequence[Part]) -> tuple[list[Interval], list[Leftover]]:
    """Return intervals and leftovers that together hold every pair of `parts` exactly once.

    The parts speak of the same heads.
    """
    skip, intervals = _chosen_queries(parts)
    leftovers: list[Leftover] = []
    earlier: list[Part] = []
    for part in sorted((p for p in parts if p.queries is None), key=_order):
        whole = Interval(part.keys, _bounds(part.start), _bounds(part.stop), skip=skip)
        remains: list[Interval] | None = None if isinstance(part.keys, Drawn) else [whole]
        for other in earlier:
            if remains is not None:
                remains = _minus(remains, other)
        if remains is None:
            held = tuple(Interval(p.keys, _bounds(p.start), _bounds(p.stop)) for p in earlier)
            leftovers.append(Leftover(whole, held))
        else:
            intervals += remains
        earlier.append(part)
    return intervals, leftovers


def inside(interval: Interval, query: Tensor, key: Tensor) -> Tensor:
    """Tell which pairs of positions (int64, broadcastable) `interval` holds; drawn blocks count as every key."""
    keys = interval.keys
    held = torch.ones_like(query == key)
    if isinstance(keys, Residue):
        held = (query - key) % keys.stride == 0
    elif isinstance(keys, (Periodic, Listed)):
        held = held & is_in(keys, key)
    for bound in interval.starts:
        held = held & (key >= bound.at(query))
    for bound in interval.stops:
        held = held & (key < bound.at(query))
    if interval.queries is not None:
        held = held & is_in(interval.queries, query)
    for skipped in interval.skip:
        held = held & ~is_in(skipped, query)
    return held


def contradict(interval: Interval) -> bool:
    """True where two bounds that go along with the query already leave no key: none can lie far enough from it."""
    starts = [b.const + b.add - b.div + 1 for b in interval.starts if b.mul == b.div]
    stops = [b.const + b.add for b in interval.stops if b.mul == b.div]
    return bool(starts and stops) and max(starts) >= min(stops)


def is_in(positions: Listed | Periodic, position: Tensor) -> Tensor:
    """Tell which of the positions (int64) are on the list."""
    if isinstance(positions, Periodic):
        return (position - positions.offset) % positions.period < positions.width
    return torch.isin(position, torch.tensor(positions.positions, dtype=torch.long, device=position.device))


def _bounds(bound: Bound | None) -> tuple[Bound, ...]:
    return () if bound is None else (bound,)


def _order(part: Part) -> tuple[int, float]:
    """Denser lists first, so that a later one lies on an earlier one as often as possible."""
    keys = part.keys
    if isinstance(keys, Every):
        return 0, 0
    if isinstance(keys, Residue):
        return 1, keys.stride
    if isinstance(keys, Periodic):
        return 2, keys.period / keys.width
    return (3, 0) if isinstance(keys, Listed) else (4, 0)


def _chosen_queries(parts: Sequence[Part]) -> tuple[tuple[Listed | Periodic, ...], list[Interval]]:
    """Return the positions some part speaks of alone, and the intervals that give them everything, each once."""
    chosen: list[Listed | Periodic] = []
    intervals = []
    for part in parts:
        if part.queries is None or part.queries in chosen:
            continue
        if (part.keys, part.start, part.stop) != (Every(), None, None):
            raise ValueError(f"a part for chosen queries must hold every key, got {part}")
        intervals.append(Interval(Every(), queries=part.queries, skip=tuple(chosen)))
        chosen.append(part.queries)
    return tuple(chosen), intervals


def _minus(intervals: list[Interval], other: Part) -> list[Interval] | None:
    """Return `intervals` without the pairs of `other`, or None where that is no set of intervals."""
    remains: list[Interval] = []
    for interval in intervals:
        keys = interval.keys
        if isinstance(keys, Listed) and isinstance(other.keys, (Listed, Periodic)):
            apart = tuple(p for p in keys.positions if not _holds(other.keys, p))
            common = tuple(p for p in keys.positions if _holds(other.keys, p))
            if apart:
                remains.append(replace(interval, keys=Listed(apart)))
            if common:
                remains += _outside(replace(interval, keys=Listed(common)), other)
        elif _contains(other.keys, keys):
            remains += _outside(interval, other)
        else:
            return None
    return remains


def _outside(interval: Interval, other: Part) -> list[Interval]:
    """Return what lies before and after `other`, whose list of keys holds all of the interval's."""
    sides = []
    if other.start is not None:
        sides.append(replace(interval, stops=(*interval.stops, other.start)))
    if other.stop is not None:
        # Where `other` is empty its start lies after its stop: the right side must then begin where the left one ends.
        after = (other.stop, *_bounds(other.start))
        sides.append(replace(interval, starts=(*interval.starts, *after)))
    # Many windows, one within the other, would otherwise double what is left with each of them.
    return [side for side in sides if not contradict(side)]


def _holds(keys: Listed | Periodic, position: int) -> bool:
    if isinstance(keys, Listed):
        return position in keys.positions
    return (position - keys.offset) % keys.period < keys.width


def _contains(outer: Keys, inner: Keys) -> bool:
    if isinstance(outer, Every) or outer == inner:
        return True
    if isinstance(outer, Residue) and isinstance(inner, Residue):
        return inner.stride % outer.stride == 0
    if isinstance(outer, Periodic) and isinstance(inner, Periodic):
        common = math.lcm(outer.period, inner.period)
        if common > _LARGEST_COMMON_PERIOD:
            return False
        position = torch.arange(common)
        return not bool((is_in(inner, position) & ~is_in(outer, position)).any())
    return False
