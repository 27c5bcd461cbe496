"""Selected blocks of keys: the blocks of queries of a key head, each with the blocks it reads, many at a time.

Whole blocks are copied, so that a tile of keys is a few long runs of memory; the rows of a tile are the queries of all
heads that share the key head.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ...selectors import Selection
from ..selected import Selected
from .lists import Tensors
from .masks import as_bias
from .tile import Tile
from .tiled import TileSpan

_SCORES = 1_000_000  # scores computed at a time
_GATHERED = 4_000_000  # numbers of gathered keys at a time
_STEPS = np.array([1, *(size << i for i in range(40) for size in (2, 3))])


def run_chosen(chosen: Selected, tensors: Tensors) -> Iterator[Tile]:
    """Yield the tiles of the selected blocks of one sequence, always in the same order.

    tensors: of all heads; the queries are the last of the keys, which are all of the sequence.
    """
    own = chosen.listed
    kv_heads = tensors.key.shape[1]
    groups = tensors.query.shape[1] // kv_heads
    widths = _widths(own)
    ranges = list(_ranges(chosen, widths, groups, max(tensors.key.shape[-1], tensors.value.shape[-1])))
    if not ranges:
        return
    room = pad(own.lists, (0, max(0, int(widths.max()) - own.lists.shape[3])), value=-1)
    for row in range(tensors.key.shape[0]):
        for kv in range(kv_heads):
            lists = room[row, kv if room.shape[1] > 1 else 0]
            read = _Blocks(chosen, row, kv, tensors)
            for start, stop in ranges:
                first, end = own.rows(start, stop, chosen.begin, chosen.end)
                part = lists[start:stop, : int(widths[start:stop].max())]
                spread = bool((own.counts[start:stop] < part.shape[1]).any()) or not own.exact
                bias, empty = _bias(chosen, part, first, end, kv, groups, tensors.query.dtype, spread)
                heads = slice(kv * groups, (kv + 1) * groups)
                place = partial(_rows, row, heads, slice(first, end), stop - start)
                yield Tile(place, [read.span(part, bias)], empty)
            read.give()


class _Blocks:
    """The keys and values of one key head of a sequence, as blocks to be copied from, and the gradients they get."""

    def __init__(self, chosen: Selected, row: int, kv: int, tensors: Tensors) -> None:
        self.size = chosen.listed.key_block
        self.first = -(-chosen.first // self.size)  # number of the first block that is held whole
        self.skip = self.first * self.size - chosen.first
        self.count = max(0, tensors.key.shape[2] - self.skip) // self.size
        self.exact = torch.promote_types(tensors.query.dtype, torch.float32)
        self.key, self.value = (self._blocks(x[row, kv]) for x in (tensors.key, tensors.value))
        self.dkey = self.dvalue = None
        if tensors.dkey is not None and tensors.dvalue is not None:
            self.dkey, self.dvalue = (self._blocks(x[row, kv]) for x in (tensors.dkey, tensors.dvalue))
            self._targets = (tensors.dkey[row, kv], tensors.dvalue[row, kv])

    def span(self, lists: Tensor, bias: Tensor | None) -> TileSpan:
        """Return the blocks of lists [T, m] as keys and values [T, m * block, D]."""
        flat = (lists - self.first).clamp(min=0).flatten()
        key, value = (
            x.index_select(0, flat).to(self.exact).view(len(lists), lists.shape[1] * self.size, -1)
            for x in (self.key, self.value)
        )
        give = None if self.dkey is None else partial(self._add, flat)
        return TileSpan(key, value, bias, give=give)

    def give(self) -> None:
        """Hand on the gradients where they were not written in place."""
        if self.dkey is None or self.dvalue is None:
            return
        for target, blocks in zip(self._targets, (self.dkey, self.dvalue), strict=True):
            own = target[self.skip : self.skip + self.count * self.size]
            own.copy_(blocks.view_as(own))

    def _blocks(self, x: Tensor) -> Tensor:
        """Return x [K, D] as whole blocks [n, block * D]."""
        own = x[self.skip : self.skip + self.count * self.size]
        return own.contiguous().view(self.count, -1)

    def _add(self, flat: Tensor, key: Tensor, value: Tensor) -> None:
        assert self.dkey is not None and self.dvalue is not None
        self.dkey.index_add_(0, flat, key.reshape(len(flat), -1))
        self.dvalue.index_add_(0, flat, value.reshape(len(flat), -1))


def _widths(own: Selection) -> np.ndarray:
    """Return how many blocks of keys a tile of each block of queries has room for, int64 [J].

    Where content decides that, it is the next of 1, 2, 3, 4, 6, 8, 12, ... for each block of queries by itself.
    """
    if own.exact:
        return own.counts
    return np.where(own.counts, _STEPS[np.searchsorted(_STEPS, own.counts)], 0)


def _ranges(chosen: Selected, widths: np.ndarray, groups: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (first, one past the last) blocks of queries that are computed at once; cut ones stand alone.

    Where content decides how many blocks are read, only blocks of queries with equal widths go together: what a later
    token selects must not change how an earlier one is computed, or it would be rounded otherwise.
    """
    own = chosen.listed
    blocks = len(widths)
    start = 0
    while start < blocks:
        if not widths[start]:
            start += 1
            continue
        stop, most = start + 1, int(widths[start])
        while stop < blocks and _whole(chosen, start) and _whole(chosen, stop) and widths[stop]:
            wider = max(most, int(widths[stop]))
            keys = wider * own.key_block * (stop + 1 - start)
            if keys * groups * own.query_block > _SCORES or keys * size > _GATHERED:
                break
            if not own.exact and widths[stop] != most:
                break
            stop, most = stop + 1, wider
        yield start, stop
        start = stop


def _whole(chosen: Selected, block: int) -> bool:
    first, stop = chosen.listed.rows(block, block + 1, chosen.begin, chosen.end)
    return stop - first == chosen.listed.query_block


def _bias(
    chosen: Selected,
    lists: Tensor,
    first: int,
    end: int,
    kv: int,
    groups: int,
    dtype: torch.dtype,
    spread: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return what is added to the scores of queries first .. end, and which rows see nothing; None for nothing.

    spread: lists may have fewer than the most entries.
    """
    if not (chosen.is_masked or spread):
        return None, None
    keys, real = chosen.listed.positions(lists)
    allowed = real[:, None]  # [T, 1, S]
    if chosen.is_masked:
        query = torch.arange(first, end, device=lists.device).view(len(lists), 1, -1, 1) + chosen.begin
        head = (kv * groups + torch.arange(groups, device=lists.device)).view(1, -1, 1, 1)
        counted = chosen.counts(head, query, keys[:, None, None]) & real[:, None, None]
        allowed = counted.expand(-1, groups, -1, -1).flatten(1, 2)
    nothing = ~allowed.any(-1)
    rows = groups * (end - first) // len(lists)
    return as_bias(allowed, dtype), nothing.expand(-1, rows) if bool(nothing.any()) else None


def _rows(row: int, heads: slice, queries: slice, tiles: int, x: Tensor) -> Tensor:
    """View rows of x [B, H, Q, ...] as [T, G, C, ...]."""
    return x[row, heads, queries].unflatten(1, (tiles, -1)).transpose(0, 1)
