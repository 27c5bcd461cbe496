"""Which blocks of queries a call has, which blocks of keys each may select, and how many."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..patterns.parts import Bound
from .base import Selector
from .choose import QueryBlocks


@lru_cache(maxsize=512)
def query_blocks(selector: Selector, begin: int, end: int, starts: tuple[Bound, ...] = ()) -> QueryBlocks:
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


def selected_pairs(selector: Selector, begin: int, end: int, starts: tuple[Bound, ...] = ()) -> int:
    """Return the pairs per head that queries begin .. end select at most, those of kept blocks not counted."""
    blocks = query_blocks(selector, begin, end, starts)
    last = np.minimum(blocks.asks + selector.queries, end)
    rows = last - np.maximum(blocks.asks, begin)
    return int((rows * blocks.counts).sum()) * selector.block
