"""Tiles of a plan: blocks of queries that read lists of key blocks, gathered and computed many at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ...plan.tiles import Tiles
from .lists import Tensors
from .masks import as_bias
from .tile import Tile
from .tiled import TileSpan

_SCORES = 1_000_000  # scores computed at a time
_GATHERED = 4_000_000  # numbers of gathered keys at a time


def run_gathered(tiles: Tiles, first_head: int, tensors: Tensors) -> Iterator[Tile]:
    """Yield the tiles of a plan, always in the same order.

    first_head: place of query head 0 of the tensors among the heads of the lists.
    """
    groups = tensors.query.shape[1] // tensors.key.shape[1]
    # Heads with lists of their own share no keys: each is computed apart.
    width = groups if len(tiles.lists) == 1 else 1
    size = max(tensors.key.shape[-1], tensors.value.shape[-1])
    for number in range(0, tensors.query.shape[1], width):
        heads = slice(first_head + number, first_head + number + width)
        for start, stop in _ranges(tiles, width, size):
            keys, allowed = _read(tiles, start, stop, heads, tensors.query.device)
            if keys.shape[1] == 0:
                continue
            for batch in range(tensors.query.shape[0]):
                place = partial(_rows, batch, slice(number, number + width), tiles, start, stop)
                yield _tile(keys, allowed, width, batch, number // groups, place, tensors)


def _ranges(tiles: Tiles, heads: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (first, one past the last) query blocks that are computed at once; blocks cut by the ends stand alone."""
    keys = tiles.lists.shape[2] * tiles.key_block
    most = max(1, min(_SCORES // max(1, keys * heads * tiles.query_block), _GATHERED // max(1, keys * size)))
    cut = [_whole(tiles, number) for number in (0, tiles.q_blocks - 1)]
    first, last = 0, tiles.q_blocks
    if not cut[0]:
        yield 0, 1
        first = 1
    if not cut[1] and last - 1 > first - 1 and last > first:
        last -= 1
    for start in range(first, last, most):
        yield start, min(start + most, last)
    if last < tiles.q_blocks and last >= first:
        yield last, tiles.q_blocks


def _whole(tiles: Tiles, block: int) -> bool:
    start, stop = tiles.rows(block, block + 1)
    return stop - start == tiles.query_block


def _read(
    tiles: Tiles, start: int, stop: int, heads: slice, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Return the key indices [T, S] of some query blocks, and which pairs [T, M, S] are allowed; None for all."""
    lists = tiles.lists[heads.start if len(tiles.lists) > 1 else 0, start:stop]
    longest = int((lists >= 0).sum(1).max())
    if longest == 0:
        return torch.empty((stop - start, 0), dtype=torch.int64), None
    if tiles.masked[start:stop].any() or not _whole(tiles, start):
        keys, pairs = tiles.check(start, stop, device, heads)
        first, end = tiles.rows(start, stop)
        skipped = (
            first + tiles.first + tiles.k_len - tiles.q_len - (tiles.first_block + start) * tiles.query_block
        )
        rows = min(tiles.query_block, end - first)
        allowed = pairs[:, :, skipped : skipped + rows].transpose(0, 1)  # [T, G, C, S]
        return keys[0], allowed.flatten(1, 2)
    blocks = torch.from_numpy(lists).to(device).long()
    inner = torch.arange(tiles.key_block, device=device)
    keys = (blocks[..., None] * tiles.key_block + inner - tiles.first).flatten(1)
    if (lists >= 0).all():
        return keys, None
    real = (blocks >= 0)[..., None].expand(-1, -1, tiles.key_block).flatten(1)[:, None]
    return keys.clamp_(min=0), real


def _rows(batch: int, heads: slice, tiles: Tiles, start: int, stop: int, x: Tensor) -> Tensor:
    """View the rows of blocks start .. stop of x [B, H, Q, ...] as [T, G, C, ...]."""
    first, end = tiles.rows(start, stop)
    return x[batch, heads, first:end].unflatten(1, (stop - start, -1)).transpose(0, 1)


def _tile(
    keys: Tensor,
    allowed: Tensor | None,
    width: int,
    batch: int,
    head: int,
    place: partial[Tensor],
    tensors: Tensors,
) -> Tile:
    exact = torch.promote_types(tensors.query.dtype, torch.float32)
    flat = keys.flatten()
    key, value = (
        x[batch, head].index_select(0, flat).to(exact).view(*keys.shape, -1)
        for x in (tensors.key, tensors.value)
    )
    bias, empty = None, None
    if allowed is not None:
        bias = as_bias(allowed, tensors.query.dtype)
        nothing = ~allowed.any(-1)
        empty = nothing if bool(nothing.any()) else None
    give = None
    if tensors.dkey is not None and tensors.dvalue is not None:
        give = partial(_scatter, tensors.dkey[batch, head], tensors.dvalue[batch, head], flat)
    return Tile(place, [TileSpan(key, value, bias, give=give)], empty)


def _scatter(dkey: Tensor, dvalue: Tensor, keys: Tensor, key: Tensor, value: Tensor) -> None:
    dkey.index_add_(0, keys, key.flatten(0, 1))
    dvalue.index_add_(0, keys, value.flatten(0, 1))
