"""Which pairs of a partly read block are allowed: functions of row and key on tables, so that no value recompiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ...plan.tiles import Tiles
from .bounds import row_bounds
from .orders import Order

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
LARGEST_LIST = 16  # key blocks per query block up to which a tile list is searched entry by entry
LARGEST_TABLE = 2**28  # bytes of the table that says which pairs of cut tiles are allowed
_BITS = 32
_BITS_AT_ONCE = 2**22  # pairs whose permission is asked for at a time


@lru_cache(maxsize=256)
def tile_reasons(tiles: Tiles) -> tuple[str, ...]:
    """Return why a tile list cannot be run here; nothing where it can."""
    most = int((tiles.lists >= 0).sum(2).max(initial=0))
    if most > LARGEST_LIST:
        return (f"a query block of the pattern reads {most} scattered key blocks, more than {LARGEST_LIST}",)
    if min(tiles.query_block, tiles.key_block) < 16:
        size = f"{tiles.query_block} x {tiles.key_block}"
        return (f"the pattern's blocks of {size} tokens, below 16 x 16, would be computed as 128 x 128",)
    words = -(-tiles.key_block // _BITS) * tiles.query_block * 4
    table = words * int(tiles.masked.sum()) * tiles.lists.shape[2] * len(tiles.heads)
    if table > LARGEST_TABLE:
        return (f"the pattern's irregular blocks need a table of {table / 2**20:,.0f} MiB",)
    return ()


def mask_of(order: Order, rows: int, device: torch.device) -> MaskMod:
    """Return the mask of a call padded to `rows` rows: True where row q of head h may attend to key k."""
    mods = [_intervals(order, rows, device)] if order.reads else []
    mods += [_tile_mask(tiles, rows, device) for tiles in order.tiles]
    if len(mods) == 1:
        return mods[0]

    def either(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = mods[0](b, h, q, k)
        for mod in mods[1:]:
            allowed = allowed | mod(b, h, q, k)
        return allowed

    return either


def _intervals(order: Order, rows: int, device: torch.device) -> MaskMod:
    lo, hi = row_bounds(order, torch.arange(order.rows, device=device))
    count = (
        1 << (len(lo) - 1).bit_length()
    )  # few different numbers of intervals, because each is compiled once
    first = torch.zeros(count, rows, dtype=torch.int32, device=device)
    stop = torch.zeros(count, rows, dtype=torch.int32, device=device)
    first[: len(lo), : order.rows] = lo.to(torch.int32)
    stop[: len(hi), : order.rows] = hi.to(torch.int32)
    first, stop = first.flatten(), stop.flatten()

    def inside(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = (k >= first[q]) & (k < stop[q])
        for number in range(1, count):
            allowed = allowed | ((k >= first[q + number * rows]) & (k < stop[q + number * rows]))
        return allowed

    return inside


def _tile_mask(tiles: Tiles, rows: int, device: torch.device) -> MaskMod:
    """The pairs of listed tiles: looked up in the row's list and, where a tile is cut, in a table of bits."""
    heads, entries = tiles.lists.shape[0], tiles.lists.shape[2]
    query_block, key_block = tiles.query_block, tiles.key_block
    words = -(-key_block // _BITS)
    begin = tiles.first + tiles.k_len - tiles.q_len
    ahead = (
        begin - tiles.first_block * query_block
    )  # rows by which the first block begins before the first query
    blocks = (rows + query_block - 1) // query_block + 1
    lists = torch.full((heads, blocks, entries), -1, dtype=torch.int32)
    lists[:, : tiles.q_blocks] = torch.from_numpy(tiles.lists)
    cut = torch.full((blocks,), -1, dtype=torch.int32)
    numbers = torch.from_numpy(tiles.masked).nonzero()[:, 0]
    cut[numbers] = torch.arange(len(numbers), dtype=torch.int32)
    bits = _bits(tiles, numbers.tolist(), words, device)
    bit_heads, cuts = bits.shape[0], bits.shape[1]
    shift = torch.tensor([ahead, tiles.first], dtype=torch.int32)
    lists, cut, bits, shift = (x.flatten().to(device, non_blocking=True) for x in (lists, cut, bits, shift))
    list_step, bit_step = int(heads > 1), int(bit_heads > 1)

    def listed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        zero = torch.zeros_like(q)
        query, key = q + shift[zero], k + shift[zero + 1]
        row, block = query // query_block, key // key_block
        start = (h * (list_step * blocks) + row) * entries
        slot = torch.full_like(q + k, -1)
        for entry in range(entries):
            slot = torch.where(lists[start + entry] == block, entry, slot)
        number = cut[row]
        place = (h * (bit_step * cuts) + number.clamp(min=0)) * entries + slot.clamp(min=0)
        place = (place * query_block + query % query_block) * words + key % key_block // _BITS
        allowed = (bits[place] >> (key % key_block % _BITS)) & 1
        return (slot >= 0) & ((number < 0) | (allowed == 1))

    return listed


def _bits(tiles: Tiles, numbers: list[int], words: int, device: torch.device) -> Tensor:
    """Return the allowed pairs of the numbered rows of tiles, int32 [H or 1, n, m, query_block, words]."""
    entries, key_block = tiles.lists.shape[2], tiles.key_block
    pairs = tiles.query_block * entries * key_block * len(tiles.heads)
    step = max(1, _BITS_AT_ONCE // max(1, pairs))
    place = torch.arange(_BITS)
    parts = [torch.zeros(len(tiles.heads), 0, entries, tiles.query_block, words, dtype=torch.int32)]
    for start in range(0, len(numbers), step):
        for first, stop in _runs(numbers[start : start + step]):
            _, allowed = tiles.check(first, stop)
            allowed = allowed.unflatten(-1, (entries, key_block)).transpose(2, 3)
            allowed = torch.nn.functional.pad(allowed, (0, words * _BITS - key_block))
            packed = (allowed.unflatten(-1, (words, _BITS)).long() << place).sum(-1)
            parts.append(torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32))
    bits = torch.cat(parts, 1)
    if bits.shape[0] > 1 and bool((bits == bits[:1]).all()):
        bits = bits[:1]
    rows = 1 << max(bits.shape[1] - 1, 0).bit_length()
    return torch.nn.functional.pad(bits, (0, 0, 0, 0, 0, 0, 0, rows - bits.shape[1]))


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Return ascending numbers as runs first .. stop."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs
