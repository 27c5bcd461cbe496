"""Selected blocks in a FlexAttention call: the block mask of a static plan joined with lists that the device holds.

One call computes both. A table tells which blocks of keys each block of queries reads; reduced over the kernel's blocks
it tells which of those hold selected pairs, and which hold nothing else. All of it is tensor arithmetic: nothing waits
for the device.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...plan.plan import HeadPlan, Plan
from ...selectors import AnySelection, Selection
from .blocks import Blocks, compact, entries_width
from .frame import Cut, Frame, cut_of, frame_of
from .masks import LARGEST_TABLE, MaskMod
from .orders import BLOCK, orders_of

NO_LISTS = "of what is selected by content FlexAttention reads lists of blocks only"


def selected_reasons(selection: AnySelection, plan: Plan) -> list[str]:
    """Return why FlexAttention cannot read what was selected for one sequence; nothing where it can."""
    if not isinstance(selection, Selection):
        return [NO_LISTS]
    if plan.q_len == 1:
        return [f"FlexAttention computes {BLOCK} queries at a time, and a single one reads selected blocks"]
    reasons = []
    rows, groups = selection.lists.shape[:2]
    for group in plan.groups:
        cut = cut_of(selection, orders_of(plan, group, selected=True).merged[0])
        lookup = rows * groups * cut.row_blocks * (cut.key_blocks + 1)
        lists = 4 * rows * len(group.heads) * (cut.rows // BLOCK) * (cut.keys // BLOCK)
        if max(lookup, lists) > LARGEST_TABLE:
            reasons.append(
                f"blocks of {selection.query_block} queries that select blocks of {selection.key_block} keys need a "
                f"table of {max(lookup, lists) / 2**20:,.0f} MiB, more than {LARGEST_TABLE / 2**20:,.0f}"
            )
    return list(dict.fromkeys(reasons))


def union_mask(
    selection: Selection, plan: Plan, group: HeadPlan, device: torch.device, *, gradients: bool, wide: bool
) -> Any:
    """Return the `BlockMask` of the first call of a group: what its order reads, and what was selected.

    Pairs that other calls, or gathered keys, hold already are left to them.

    Args:
        selection: of the sequence, for its R rows; the mask is for a batch of R.
        gradients: lists for the backward pass are wanted.
        wide: lists of keys have room for every key block.
    """
    from torch.nn.attention.flex_attention import BlockMask

    orders = orders_of(plan, group, selected=True)
    cut = cut_of(selection, orders.merged[0])
    own, shared = selection.lists.shape[1], plan.heads // selection.lists.shape[1]
    number = tuple(head // shared if own > 1 else 0 for head in group.heads)
    with torch.no_grad():
        frame = frame_of(orders, plan.constraint, cut, number, device)
        lookup = _lookup(selection, cut, plan)
        partial, full = _occupied(lookup, frame)
        most = _most(selection, frame)
        columns = cut.keys // BLOCK
        widths = [
            columns if wide else entries_width(static + m, columns)
            for static, m in zip(frame.widths, most, strict=True)
        ]
        heads = frame.heads if own > 1 and frame.partial.shape[0] == 1 else None
        lists = [_listed(x, w, heads) for x, w in zip((partial, full), widths, strict=True)]
        back: list[Blocks | None] = [None, None]
        if gradients:
            back = [_listed(x.mT, cut.rows // BLOCK, heads) for x in (partial, full)]
    (some, every), (some_rows, every_rows) = lists, back
    return BlockMask(
        seq_lengths=(cut.rows, cut.keys),
        kv_num_blocks=some.count,
        kv_indices=some.index,
        full_kv_num_blocks=every.count,
        full_kv_indices=every.index,
        q_num_blocks=None if some_rows is None else some_rows.count,
        q_indices=None if some_rows is None else some_rows.index,
        full_q_num_blocks=None if every_rows is None else every_rows.count,
        full_q_indices=None if every_rows is None else every_rows.index,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=_mask(lookup, frame),
    )


def _lookup(selection: Selection, cut: Cut, plan: Plan) -> Tensor:
    """Return the blocks of keys that blocks of queries read, bool [R, G, row_blocks, key_blocks + 1]; the last none."""
    number = selection.lists - plan.first // cut.key_block
    number = torch.where((number >= 0) & (number < cut.key_blocks), number, cut.key_blocks)
    rows, groups, blocks, _ = number.shape
    table = torch.zeros(
        (rows, groups, cut.row_blocks, cut.key_blocks + 1), dtype=torch.bool, device=number.device
    )
    table[:, :, :blocks].scatter_(3, number, True)
    return table


def _occupied(lookup: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
    """Return the kernel's blocks that are read in part and wholly, bool [R, G, h or 1, n, m]."""
    near = lookup[:, :, frame.rows]
    some = near.any(3)[..., frame.keys].any(4) & frame.reach
    every = near.all(3)[..., frame.keys].all(4) & frame.whole
    if frame.elsewhere:
        every = torch.zeros_like(every)
    if frame.partial.shape[0] > 1 and some.shape[1] > 1:  # the static plan's lists differ by query head
        some, every = some[:, frame.heads], every[:, frame.heads]
    full = frame.full | every
    return (frame.partial | some) & ~full, full


def _most(selection: Selection, frame: Frame) -> tuple[int, int]:
    """Return how many of the kernel's key blocks the selected ones add at most to a list, in part and wholly."""
    size, counts = frame.cut.key_block, selection.counts
    before = np.concatenate([[0], np.cumsum(counts)])
    first, last = (np.minimum(x, len(counts) - 1) for x in frame.spans)
    # Where a block of keys begins among the kernel's: at the latest so far behind the beginning of one.
    step = math.gcd(size, BLOCK)
    latest = BLOCK - step + -frame.cut.ahead_keys % step
    touched = (latest + size - 1) // BLOCK + 1
    return int((before[last + 1] - before[first]).max()) * touched, int(counts.max()) * size // BLOCK


def _listed(dense: Tensor, width: int, heads: Tensor | None) -> Blocks:
    """Return bool [R, G, n, m] as lists of up to `width` blocks, for the query heads that `heads` picks out of G."""
    columns = torch.arange(dense.shape[3], device=dense.device)
    lists = compact(columns.expand(dense.flatten(0, 1).shape), dense.flatten(0, 1), width)
    count, index = (x[0].unflatten(0, dense.shape[:2]) for x in (lists.count, lists.index))
    if heads is not None:
        count, index = count[:, heads], index[:, heads]
    return Blocks(count.contiguous(), index.contiguous())


def _mask(lookup: Tensor, frame: Frame) -> MaskMod:
    """Return the mask of the static plan or the selection."""
    cut, static = frame.cut, frame.static
    query_block, key_block, rows, keys = cut.query_block, cut.key_block, cut.rows, cut.keys
    groups, blocks, wide = lookup.shape[1:]
    table, shift, elsewhere = lookup.flatten(), frame.shift, frame.elsewhere
    own, first, stop = frame.heads.to(torch.int32), frame.first, frame.stop
    starts, stops, places = frame.starts, frame.stops, frame.places

    def selected(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        zero = torch.zeros_like(q)
        row = (q + shift[zero]) // query_block
        block = (k + shift[zero + 1]) // key_block
        allowed = table[((b * groups + own[h]) * blocks + row) * wide + block]
        allowed = allowed & (k >= first[q]) & (k < stop[q])
        for number in range(elsewhere):
            place = places[k + number * keys]
            allowed = allowed & ((place < starts[q + number * rows]) | (place >= stops[q + number * rows]))
        return allowed

    if static is None:
        return selected

    def either(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return static(b, h, q, k) | selected(b, h, q, k)

    return either
