"""The tiles of a run and of a plan's tile lists: which rows, heads and keys each one takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...plan.tiles import Tiles
from .schedule import Mask, Run, Span
from .tiled import TileSpan

# Scores of one tile, per thread: two tiles of float32 fit the second-level cache of a core.
_TILE_SCORES = 160_000


@dataclass(frozen=True)
class Tile:
    """One tile: `batch` row, query `heads`, query `rows`, and what the rows read.

    empty: [M] or [H_kv, M] bool, rows that see no key, M = rows * H / H_kv.
    """

    batch: int
    heads: slice
    rows: slice
    spans: list[TileSpan]
    empty: Tensor | None

    @property
    def place(self) -> tuple[int, slice, slice]:
        """Index of the tile's queries in a tensor [B, H, Q, ...]."""
        return self.batch, self.heads, self.rows


def run_tiles(
    run: Run,
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    dkeys: list[Tensor] | None = None,
    dvalues: list[Tensor] | None = None,
) -> Iterator[Tile]:
    """Yield the tiles of a run, always in the same order.

    Args:
        query: [B, H, Q, D].
        keys, values: one [B, H_kv, K, D or Dv] per piece; dkeys, dvalues: where their gradients are added.
    """
    if not run.spans:
        return
    kv_heads = keys[0].shape[1]
    groups = query.shape[1] // kv_heads
    biases = [run_bias(span, groups, run, query) for span in run.spans]
    empty = None if run.empty is None else torch.from_numpy(run.empty).repeat(groups).to(query.device)
    scores = run.rows * groups * sum(span.width for span in run.spans)
    for batch, kv, heads in _head_groups(query, kv_heads, scores):
        for number, rows in run.chunks():
            spans = []
            for span, bias in zip(run.spans, biases, strict=True):
                part = (batch, kv, span.keys(number))
                tile = TileSpan(keys[span.piece][part], values[span.piece][part], bias)
                if dkeys is not None and dvalues is not None:
                    tile.dkey, tile.dvalue = dkeys[span.piece][part], dvalues[span.piece][part]
                spans.append(tile)
            yield Tile(batch, heads, rows, spans, empty)


def plan_tiles(
    tile_lists: tuple[Tiles, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dkey: Tensor | None = None,
    dvalue: Tensor | None = None,
) -> Iterator[Tile]:
    """Yield the tiles of a plan's tile lists, keys gathered; tensors as in `run_tiles`, not lists."""
    kv_heads = key.shape[1]
    for tiles in tile_lists:
        for block, blocks in enumerate(tiles.key_blocks):
            if not len(blocks):
                continue
            rows = slice(*tiles.rows(block))
            index, allowed = tiles.tile(block, query.device)
            allowed = allowed.reshape(kv_heads, -1, len(index))
            empty = ~allowed.any(-1)
            bias = _as_bias(allowed | empty[..., None], query.dtype)
            for batch, kv, heads in _head_groups(query, kv_heads, allowed[0].numel()):
                read_key, read_value = (x[batch, kv].index_select(1, index) for x in (key, value))
                span = TileSpan(read_key, read_value, bias[kv], index)
                if dkey is not None and dvalue is not None:
                    span.dkey, span.dvalue = dkey[batch, kv], dvalue[batch, kv]
                yield Tile(batch, heads, rows, [span], empty[kv])


def _head_groups(query: Tensor, kv_heads: int, scores: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield (batch row, key heads, query heads): as many heads at once as the cache holds, one per thread at least."""
    step = kv_heads
    if query.device.type == "cpu":
        threads = torch.get_num_threads()
        step = min(kv_heads, max(threads, _TILE_SCORES * threads // scores))
    groups = query.shape[1] // kv_heads
    for batch in range(query.shape[0]):
        for head in range(0, kv_heads, step):
            stop = min(head + step, kv_heads)
            yield batch, slice(head, stop), slice(head * groups, stop * groups)


def run_bias(span: Span, groups: int, run: Run, query: Tensor) -> Tensor | None:
    """Return a span's bias [M, S], M = rows of all `groups` query heads of a key head; None without a mask."""
    if span.mask is None:
        return None
    if run.empty is None:
        return _mask_bias(span.mask, span.width, groups, query.dtype, query.device)
    # A row without any key is computed over all of them, and its result dropped: a softmax of nothing is nan.
    empty = torch.from_numpy(run.empty).to(query.device)[:, None]
    return _as_bias(span.mask.allowed(span.width, query.device) | empty, query.dtype).repeat(groups, 1)


@lru_cache(maxsize=32)  # a few masks serve all layers and steps; each is some 100 KiB
def _mask_bias(mask: Mask, width: int, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _as_bias(mask.allowed(width, device), dtype).repeat(groups, 1)


def _as_bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    exact = torch.promote_types(dtype, torch.float32)
    return torch.zeros(allowed.shape, dtype=exact, device=allowed.device).masked_fill_(
        ~allowed, float("-inf")
    )
