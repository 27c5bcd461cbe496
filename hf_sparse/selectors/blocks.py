"""Selectors that list blocks of keys: which blocks of queries a call has, and which each may select, and how many."""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache
from typing import ClassVar

import numpy as np

from ..patterns.parts import Bound
from .base import Selector
from .choose import QueryBlocks


class ListSelector(Selector):
    """A selector that lists blocks of keys for each block of queries."""

    takes_all_counted: ClassVar[bool] = True  # lists are filled as far as the budget goes
    looks_back: ClassVar[int] = 1  # queries, the block's first one the last of them, that scoring looks at

    @property
    def before(self) -> int:
        """Blocks before a query's own that are kept."""
        return self.local

    @abstractmethod
    def wanted(self, seen: int) -> int:
        """Return how many of `seen` blocks, the query's own one included, are read."""

    def most_pairs(self, begin: int, end: int, starts: tuple[Bound, ...] = ()) -> int:
        blocks = query_blocks(self, begin, end, starts)
        last = np.minimum(blocks.asks + self.queries, end)
        return int(((last - np.maximum(blocks.asks, begin)) * blocks.counts).sum()) * self.block


@lru_cache(maxsize=512)
def query_blocks(selector: ListSelector, begin: int, end: int, starts: tuple[Bound, ...] = ()) -> QueryBlocks:
    """Return the blocks of causal queries at positions begin .. end.

    starts: before which the model itself lets a query see nothing; only blocks that the asking query may see whole are
        selected, and shares are of those.
    """
    numbers = np.arange(begin // selector.queries, -(-end // selector.queries))
    asks = numbers * selector.queries
    own = asks // selector.block
    least = np.zeros_like(asks)
    for start in starts:
        least = np.maximum(least, start.at(asks))
    first = np.minimum(-(-least // selector.block), own)
    high = np.maximum(own - selector.before, first)
    low = np.clip(np.full_like(high, selector.sinks), first, high)
    seen = own + 1 - first
    kept = seen - (high - low)
    wanted = np.array([selector.wanted(int(count)) for count in seen], dtype=np.int64)
    counts = np.clip(wanted - kept, 0, high - low)
    return QueryBlocks(int(numbers[0]) if len(numbers) else 0, asks, low, high, counts)
