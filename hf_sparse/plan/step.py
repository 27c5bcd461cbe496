"""A plan for one query, the decoding step: which keys it reads, from closed forms and without a list of all keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ..patterns.parts import Drawn, Every, Keys, Listed, Part, Periodic, Residue
from .columns import joined, slots_of
from .constraint import Constraint
from .intervals import Interval, Leftover, disjoint, is_in
from .pieces import indices_of
from .segments import Columns


@dataclass(frozen=True, eq=False)
class Reads:
    """The keys that one query reads in the heads `heads`, each once.

    ranges: key indices, the same for all the heads.
    listed: further key indices, int64 [H or 1, m], -1 where a head has fewer; None where there are none.
    """

    heads: tuple[int, ...]
    ranges: tuple[range, ...]
    listed: np.ndarray | None = None

    @property
    def pairs(self) -> int:
        """Keys read, summed over the heads."""
        pairs = len(self.heads) * sum(len(r) for r in self.ranges)
        if self.listed is not None:
            each = 1 if len(self.listed) == len(self.heads) else len(self.heads)
            pairs += each * int((self.listed >= 0).sum())
        return pairs

    def keys_of(self, head: int) -> np.ndarray:
        """Return the key indices that `head`, one of `heads`, reads."""
        keys = [np.arange(r.start, r.stop, r.step) for r in self.ranges]
        if self.listed is not None:
            own = self.listed[self.heads.index(head) if len(self.listed) > 1 else 0]
            keys.append(own[own >= 0])
        return np.concatenate(keys) if keys else np.empty(0, dtype=np.int64)

    @property
    def n_pieces(self) -> int:
        return len(self.ranges) + (self.listed is not None)


def reads_of(
    parts: tuple[Part, ...],
    constraint: Constraint,
    k_len: int,
    heads: int,
    first: int,
    columns: Columns | None = None,
) -> tuple[Reads, ...]:
    """Return what the last of `k_len` keys reads as a query, group by group; arguments as in `make_plan`."""
    query = first + k_len - (0 if columns is None else len(columns)) - 1
    return tuple(
        _reads(numbers, intervals, leftovers, constraint, query, first, columns)
        for numbers, intervals, leftovers in _disjoint_by_head(parts, heads)
    )


def by_head(parts: Sequence[Part], heads: int) -> list[tuple[tuple[int, ...], tuple[Part, ...]]]:
    """Return the heads that have the same parts, with these."""
    if all(part.heads is None for part in parts):
        return [(tuple(range(heads)), tuple(parts))]
    groups: dict[tuple[Part, ...], list[int]] = {}
    for head in range(heads):
        own = tuple(
            Part(p.keys, p.start, p.stop, p.queries) for p in parts if p.heads is None or head in p.heads
        )
        groups.setdefault(own, []).append(head)
    return [(tuple(numbers), own) for own, numbers in groups.items()]


@lru_cache(maxsize=64)
def _disjoint_by_head(
    parts: tuple[Part, ...], heads: int
) -> tuple[tuple[tuple[int, ...], tuple[Interval, ...], tuple[Leftover, ...]], ...]:
    groups = []
    for numbers, own in by_head(parts, heads):
        intervals, leftovers = disjoint(own)
        groups.append((numbers, tuple(intervals), tuple(leftovers)))
    return tuple(groups)


def _reads(
    heads: tuple[int, ...],
    intervals: tuple[Interval, ...],
    leftovers: tuple[Leftover, ...],
    constraint: Constraint,
    query: int,
    first: int,
    columns: Columns | None,
) -> Reads:
    ranges: list[range] = []
    listed: list[np.ndarray] = []
    own = [np.empty(0, dtype=np.int64)] * len(heads)

    def read(positions: range | np.ndarray) -> None:
        for slots in slots_of(positions, first, columns):
            if isinstance(slots, range):
                ranges.append(slots)
            else:
                listed.append(slots)

    least = first if columns is None else 0
    for interval in intervals:
        if _speaks_of(interval, query):
            read(_keys(interval.keys, query, *_between(interval, constraint, query, least)))
    for leftover in leftovers:
        if not _speaks_of(leftover.interval, query):
            continue
        low, high = _between(leftover.interval, constraint, query, least)
        if isinstance(leftover.interval.keys, Drawn):
            drawn = _drawn(leftover, heads, query, low, high)
            own = [np.concatenate(both) for both in zip(own, drawn, strict=True)]
        else:
            found = np.asarray(_keys(leftover.interval.keys, query, low, high), dtype=np.int64)
            read(found[_allowed(leftover, heads[0], query, found)])
    ranges = joined(ranges)
    shared = np.concatenate(listed) if listed else np.empty(0, dtype=np.int64)
    if any(len(keys) for keys in own):
        return Reads(heads, tuple(ranges), _table([np.concatenate((shared, keys - first)) for keys in own]))
    return Reads(heads, tuple(ranges), shared[None] if len(shared) else None)


def _keys(keys: Keys, query: int, low: int, high: int) -> range | np.ndarray:
    """Return the positions low <= k < high that are on the list of a part that is not drawn."""
    if isinstance(keys, Every):
        return range(low, high)
    if isinstance(keys, Residue):
        return range(low + (query - low) % keys.stride, high, keys.stride)
    if isinstance(keys, Periodic) and keys.width == 1:
        return range(low + (keys.offset - low) % keys.period, high, keys.period)
    if isinstance(keys, Periodic):
        comb = indices_of(keys, low, high - low)
        return low + comb.at(np.arange(comb.count))
    assert isinstance(keys, Listed)
    return _inside(np.array(keys.positions, dtype=np.int64), low, high)


def _table(rows: list[np.ndarray]) -> np.ndarray:
    table = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return table


def _speaks_of(interval: Interval, query: int) -> bool:
    if interval.queries is None and not interval.skip:
        return True
    at = torch.tensor(query)
    if interval.queries is not None and not bool(is_in(interval.queries, at)):
        return False
    return not any(bool(is_in(skipped, at)) for skipped in interval.skip)


def _between(interval: Interval, constraint: Constraint, query: int, least: int) -> tuple[int, int]:
    """Return the first position from `least` on, and one past the last, that the bounds leave the last token."""
    starts, stops = constraint.bounds()
    low = max([least, *(b.at(query) for b in (*interval.starts, *starts))])
    high = min([query + 1, *(b.at(query) for b in (*interval.stops, *stops))])
    return low, max(low, high)


def _inside(positions: np.ndarray, low: int, high: int) -> np.ndarray:
    return positions[(positions >= low) & (positions < high)]


def _drawn(leftover: Leftover, heads: tuple[int, ...], query: int, low: int, high: int) -> list[np.ndarray]:
    """Return the positions drawn for each head."""
    keys = leftover.interval.keys
    assert isinstance(keys, Drawn)
    blocks = keys.draw(torch.tensor(heads), torch.tensor([query // keys.query_block]))[:, 0].numpy()
    rows = []
    for head, drawn in zip(heads, blocks, strict=True):
        positions = (drawn[drawn >= 0, None] * keys.key_block + np.arange(keys.key_block)).ravel()
        positions = _inside(positions, low, high)
        rows.append(positions[_allowed(leftover, head, query, positions)])
    return rows


def _allowed(leftover: Leftover, head: int, query: int, keys: np.ndarray) -> np.ndarray:
    key = torch.from_numpy(keys)
    return leftover.allowed(torch.tensor([head]), torch.tensor([query]), key).expand(key.shape).numpy()
