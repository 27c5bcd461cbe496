"""The blocks of a call: for every BLOCK rows the key blocks they read, told apart into partly and wholly read ones.

The first and the last block of a stretch follow from the bounds of its first and last row alone, because bounds never
decrease along a row order; everything else is arithmetic on the device. Nothing here looks at n x n pairs, and nothing
waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...plan.tiles import Tiles
from .bounds import row_bounds
from .orders import BLOCK, Order

_NARROWEST = (
    8  # entries that every list of blocks has room for: windows up to about a thousand keys share kernels
)


@dataclass(frozen=True)
class Blocks:
    """Lists of blocks, int32: `count` [1, H or 1, n] entries of `index` [1, H or 1, n, m] are valid, the others 0."""

    count: Tensor
    index: Tensor


@dataclass(frozen=True)
class BlockTables:
    """What each block of rows reads, and (only where gradients are wanted) which blocks of rows read each key block."""

    partial: Blocks
    full: Blocks
    partial_rows: Blocks | None
    full_rows: Blocks | None


def block_tables(
    order: Order,
    row_blocks: int,
    key_blocks: int,
    device: torch.device,
    *,
    gradients: bool,
    wide: bool = False,
) -> BlockTables:
    """Return the tables of a call padded to `row_blocks` and `key_blocks` blocks.

    wide: the rows' tables have room for every key block, not just for those of the longest row.
    """
    hull = _hull(order, row_blocks)
    listed = [_tile_blocks(tiles, row_blocks) for tiles in order.tiles]
    widths = [int(w) for w in (hull[1] - hull[0]).amax(1)] if len(hull[0]) else []
    first, stop, full_first, full_stop = (x.to(device, non_blocking=True) for x in hull)
    candidates, wholes = [], []
    for number, width in enumerate(widths):
        block = first[number, :, None] + torch.arange(width, device=device)
        block = torch.where(block < stop[number, :, None], block, key_blocks)
        inside = (block[None] >= full_first[:, :, None]) & (block[None] < full_stop[:, :, None])
        candidates.append(block[None])
        wholes.append(inside.any(0)[None])
    for blocks in listed:
        block = torch.from_numpy(blocks).to(device, non_blocking=True)
        block = torch.where(block >= 0, block, key_blocks)
        candidates.append(block)
        wholes.append(torch.zeros_like(block, dtype=torch.bool))
    heads = max((c.shape[0] for c in candidates), default=1)
    if not candidates:
        candidates = [torch.full((1, row_blocks, 1), key_blocks, device=device)]
        wholes = [torch.zeros((1, row_blocks, 1), dtype=torch.bool, device=device)]
    block = torch.cat([c.expand(heads, -1, -1) for c in candidates], 2)
    whole = torch.cat([w.expand(heads, -1, -1) for w in wholes], 2)
    # A block found twice is kept once, and as a whole one where it is whole.
    block, place = (2 * block + ~whole).sort(dim=2)
    block, whole = block // 2, whole.gather(2, place)
    new = block < key_blocks
    new[..., 1:] &= block[..., 1:] != block[..., :-1]
    cut, uncut = hull[1] - hull[0] - (hull[3] - hull[2]), hull[3] - hull[2]
    longest = [int(cut.sum(0).max()) + sum(blocks.shape[2] for blocks in listed), int(uncut.sum(0).max())]
    if wide:
        longest = [key_blocks, key_blocks]
    partial = compact(block, new & ~whole, entries_width(longest[0], key_blocks))
    full = compact(block, new & whole, entries_width(longest[1], key_blocks))
    if not gradients:
        return BlockTables(partial, full, None, None)
    most_partial, most_full = (entries_width(n, row_blocks) for n in _most_rows(hull, listed, key_blocks))
    return BlockTables(
        partial,
        full,
        _transposed(partial, key_blocks, most_partial),
        _transposed(full, key_blocks, most_full),
    )


def _hull(order: Order, row_blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the blocks first .. stop that any row of a row block may read, and those that all its rows read whole.

    Each is int64 [reads, row_blocks], on the host.
    """
    shape = (len(order.reads), row_blocks)
    if not order.reads or not order.rows:
        return tuple(torch.zeros(shape, dtype=torch.long) for _ in range(4))  # type: ignore[return-value]
    starts = torch.arange(0, order.rows, BLOCK)
    # Bounds never decrease, over residues neither: the keys of one lie behind all those of the one before.
    rows = torch.cat([starts, (starts + BLOCK - 1).clamp(max=order.rows - 1)])
    lo, hi = row_bounds(order, rows)
    block = (rows // BLOCK).expand(lo.shape)

    def reduce(values: Tensor, how: str, empty: int) -> Tensor:
        return torch.full(shape, empty).scatter_reduce_(1, block, values, how)

    far = 2**62
    first = reduce(lo, "amin", far) // BLOCK
    stop = -(-reduce(hi, "amax", 0) // BLOCK)
    full_first = -(-reduce(lo, "amax", 0) // BLOCK)
    full_stop = reduce(hi, "amin", far) // BLOCK
    stop = torch.maximum(stop, first)
    full_first = torch.minimum(full_first, stop)
    full_stop = torch.maximum(full_stop.clamp(max=stop), full_first)
    none = torch.arange(row_blocks) * BLOCK >= order.rows
    first, stop, full_first, full_stop = (
        x.masked_fill(none, 0) for x in (first, stop, full_first, full_stop)
    )
    return first, stop, full_first, full_stop


def _tile_blocks(tiles: Tiles, row_blocks: int) -> np.ndarray:
    """Return the key blocks, int64 [H or 1, row_blocks, m], that hold listed tiles; -1 where a list is shorter."""
    begin = tiles.first + tiles.k_len - tiles.q_len
    row = np.arange(row_blocks) * BLOCK
    row_first = (row + begin) // tiles.query_block - tiles.first_block
    row_last = (np.minimum(row + BLOCK, tiles.q_len) - 1 + begin) // tiles.query_block - tiles.first_block
    rows = row_first[:, None] + np.arange(-(-BLOCK // tiles.query_block) + 1)
    held = (rows <= row_last[:, None]) & (row < tiles.q_len)[:, None]
    lists = tiles.lists[:, np.where(held, rows, 0)].astype(np.int64)  # [H or 1, row_blocks, rows of tiles, m]
    real = held[None, :, :, None] & (lists >= 0)
    key_first = np.maximum(lists * tiles.key_block - tiles.first, 0)
    key_last = np.minimum((lists + 1) * tiles.key_block - tiles.first, tiles.k_len) - 1
    block = (key_first // BLOCK)[..., None] + np.arange(-(-tiles.key_block // BLOCK) + 1)
    block = np.where(real[..., None] & (block <= (key_last // BLOCK)[..., None]), block, -1)
    return block.reshape(lists.shape[0], row_blocks, -1)


def _most_rows(hull: tuple[Tensor, ...], listed: list[np.ndarray], key_blocks: int) -> tuple[int, int]:
    """Return upper bounds of the row blocks that read one key block partly, and wholly."""

    def counted(first: Tensor, stop: Tensor) -> np.ndarray:
        change = torch.zeros(key_blocks + 1, dtype=torch.long)
        one = torch.ones(first.numel(), dtype=torch.long)
        change.index_add_(0, first.flatten(), one).index_add_(0, stop.flatten(), -one)
        return change.cumsum(0)[:key_blocks].numpy()

    full = counted(hull[2], hull[3])
    partial = counted(hull[0], hull[1]) - full
    for blocks in listed:
        rows = [np.bincount(own[own >= 0].ravel(), minlength=key_blocks) for own in blocks]
        partial = partial + np.max(rows, axis=0)
    return int(partial.max(initial=1)), int(full.max(initial=1))


def entries_width(entries: int, most: int) -> int:
    """Return a width for `entries` list entries: few different ones, because each is compiled once."""
    return min(most, max(_NARROWEST, 1 << max(entries - 1, 0).bit_length()))


def compact(block: Tensor, keep: Tensor, width: int) -> Blocks:
    """Return the kept entries of each list, in order."""
    place = torch.where(keep, keep.cumsum(2) - 1, width)
    index = block.new_zeros((*block.shape[:2], width + 1)).scatter_(2, place, block.where(keep, 0))
    return Blocks(keep.sum(2)[None].to(torch.int32), index[None, ..., :width].to(torch.int32).contiguous())


def _transposed(blocks: Blocks, key_blocks: int, most: int) -> Blocks:
    """Return the row blocks that list each key block, in ascending order."""
    index = blocks.index[0].long()
    heads, rows, width = index.shape
    valid = torch.arange(width, device=index.device) < blocks.count[0, ..., None]
    column = torch.where(valid, index, key_blocks).flatten(1)
    column, place = column.sort(dim=1, stable=True)
    edges = torch.searchsorted(
        column, torch.arange(key_blocks + 1, device=index.device).expand(heads, -1).contiguous()
    )
    count = edges[:, 1:] - edges[:, :-1]
    slot = torch.arange(most, device=index.device)
    entry = (edges[:, :-1, None] + slot).clamp(max=rows * width - 1)
    row = place.gather(1, entry.flatten(1)).view(heads, key_blocks, most) // width
    row = torch.where(slot < count[..., None], row, 0)
    return Blocks(count[None].to(torch.int32), row[None].to(torch.int32).contiguous())
