"""What joining a plan with selected blocks takes, the selection apart: made once for all layers, on the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ...plan.constraint import Constraint
from ...plan.pieces import Lattice
from ...selectors import Selection
from .blocks import Blocks, block_tables
from .bounds import row_bounds, sorting
from .kernel import padded_length
from .masks import MaskMod, mask_of
from .orders import BLOCK, GroupOrders, Order, Reads


@dataclass(frozen=True)
class Cut:
    """How a call's rows and its key axis, both padded, lie on the blocks of a selection.

    rows, keys: padded lengths.
    query_block, key_block: tokens per block.
    ahead_rows, ahead_keys: tokens by which the first block begins before the first row and before the first key.
    """

    rows: int
    keys: int
    query_block: int
    key_block: int
    ahead_rows: int
    ahead_keys: int

    @property
    def row_blocks(self) -> int:
        """Blocks of queries that the lookup has room for: wherever the first begins, lengths padded alike share it."""
        return -(-self.rows // self.query_block) + 1

    @property
    def key_blocks(self) -> int:
        return -(-self.keys // self.key_block) + 1


@dataclass(frozen=True, eq=False)
class Frame:
    """What a mask needs besides the selection: made once for all layers, on the device.

    cut: how the rows and keys lie on the blocks of the selection; shift: int32 [2], by how much, for the device.
    heads: int64 [h], which of the selection's lists each query head reads.
    spans: first and last block of queries of each block of rows, on the host, [n] each; rows: int64 [n, w], the same
        with those between, the last one repeated. keys: int64 [m, w], likewise the blocks of keys of a key block.
    partial, full: bool [h or 1, n, m], what the static plan reads; widths: most entries of its lists.
    reach, whole: bool [n, m], blocks in which the host lets some pair count, and all.
    first, stop: int32 [rows], the keys that the host lets a row see.
    elsewhere: how many other places hold pairs of this call. starts, stops: int32 [elsewhere * rows], places: int32
        [elsewhere * keys]: one holds key k of row q where starts[q] <= places[k] < stops[q].
    static: the mask of the static plan, None where it reads nothing in this call.
    """

    cut: Cut
    heads: Tensor
    spans: tuple[np.ndarray, np.ndarray]
    rows: Tensor
    keys: Tensor
    partial: Tensor
    full: Tensor
    widths: tuple[int, int]
    reach: Tensor
    whole: Tensor
    first: Tensor
    stop: Tensor
    elsewhere: int
    starts: Tensor
    stops: Tensor
    places: Tensor
    shift: Tensor
    static: MaskMod | None


def cut_of(selection: Selection, order: Order) -> Cut:
    begin = order.key_position + order.k_len - order.q_len
    return Cut(
        padded_length(order.rows),
        padded_length(order.keys),
        selection.query_block,
        selection.key_block,
        begin - selection.first_block * selection.query_block,
        order.key_position % selection.key_block,
    )


@lru_cache(maxsize=32)
def frame_of(
    orders: GroupOrders, constraint: Constraint, cut: Cut, heads: tuple[int, ...], device: torch.device
) -> Frame:
    order = orders.merged[0]
    # Kept for later calls: tables made in inference mode could not be used in training.
    with torch.inference_mode(False):
        shape = cut.rows // BLOCK, cut.keys // BLOCK
        static = block_tables(order, *shape, device, gradients=False)
        limit = _limit(order, constraint)
        lets = block_tables(limit, *shape, device, gradients=False)
        whole = _dense(lets.full, shape[1])[0]
        first, stop = (x[0] for x in row_bounds(limit, torch.arange(order.rows, device=device)))
        spans, rows = _touched(shape[0], order.q_len, cut.ahead_rows, cut.query_block)
        _, keys = _touched(shape[1], order.k_len, cut.ahead_keys, cut.key_block)
        elsewhere, starts, stops, places = _elsewhere(orders, cut, device)
        return Frame(
            cut,
            torch.tensor(heads).to(device, non_blocking=True),
            spans,
            torch.from_numpy(rows).to(device, non_blocking=True),
            torch.from_numpy(keys).to(device, non_blocking=True),
            _dense(static.partial, shape[1]),
            _dense(static.full, shape[1]),
            (static.partial.index.shape[3], static.full.index.shape[3]),
            _dense(lets.partial, shape[1])[0] | whole,
            whole,
            _padded(first, cut.rows),
            _padded(stop, cut.rows),
            elsewhere,
            starts,
            stops,
            places,
            torch.tensor([cut.ahead_rows, cut.ahead_keys], dtype=torch.int32).to(device, non_blocking=True),
            mask_of(order, cut.rows, device) if order.reads or order.tiles else None,
        )


def _limit(order: Order, constraint: Constraint) -> Order:
    """Return what the host alone lets each row see: causality, a window, the keys there are."""
    every, reads = (Lattice(0, order.k_len),), (Reads(0, *constraint.bounds()),)
    return Order(None, 1, every, (0,), reads, (), order.q_len, order.k_len, order.key_position)


def _touched(
    blocks: int, tokens: int, ahead: int, size: int
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Return which blocks of `size` tokens each of the kernel's blocks touches: the first and last, and all [n, w]."""
    begin = np.arange(blocks) * BLOCK
    held = begin < tokens
    first = np.where(held, (begin + ahead) // size, 0)
    last = np.where(held, (np.minimum(begin + BLOCK, tokens) - 1 + ahead) // size, 0)
    width = int((last - first).max(initial=0)) + 1
    return (first, last), np.minimum(first[:, None] + np.arange(width), last[:, None])


def _elsewhere(orders: GroupOrders, cut: Cut, device: torch.device) -> tuple[int, Tensor, Tensor, Tensor]:
    """Return where pairs of the sequence are held on other axes: gathered keys, or tokens in another order."""
    order, *others = orders.merged
    queries = torch.arange(order.q_len, device=device)
    starts, stops, places = [], [], []
    lo, hi = row_bounds(order, queries) if order.reads else (queries[None], queries[None])
    for number, reads in enumerate(order.reads):
        if reads.keys:
            indices = order.lists[reads.keys]
            index = torch.from_numpy(indices.at(np.arange(indices.count))).to(device, non_blocking=True)
            place = torch.full((cut.keys,), -1, device=device)
            place[index] = order.places[reads.keys] + torch.arange(indices.count, device=device)
            starts.append(lo[number])
            stops.append(hi[number])
            places.append(place)
    for other in others:
        lo, hi = row_bounds(other, queries)
        row, place = sorting(other, other.k_len - other.q_len, device)[1], sorting(other, 0, device)[1]
        starts += list(lo[:, row])
        stops += list(hi[:, row])
        places += [torch.nn.functional.pad(place, (0, cut.keys - len(place)), value=-1)] * len(lo)
    count = len(starts)
    if not count:
        none = queries.new_zeros(1, dtype=torch.int32)
        return 0, none, none, none
    first, stop = (torch.cat([_padded(x, cut.rows) for x in own]) for own in (starts, stops))
    return count, first, stop, torch.cat(places).to(torch.int32)


def _padded(x: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, length - len(x))).to(torch.int32)


def _dense(blocks: Blocks, columns: int) -> Tensor:
    """Return lists of blocks as bool [H or 1, n, columns]."""
    index = blocks.index[0].long()
    real = torch.arange(index.shape[2], device=index.device) < blocks.count[0, ..., None]
    dense = torch.zeros((*index.shape[:2], columns + 1), dtype=torch.bool, device=index.device)
    return dense.scatter_(2, index.where(real, columns), True)[..., :columns]
