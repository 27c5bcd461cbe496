"""Tiles of all heads for one chunk of rows at a time: runs that are short or irregular."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .lists import Lists
from .masks import empty_rows, span_bias
from .runs import Run
from .tile import Tile
from .tiled import TileSpan

# Scores of one tile, per thread: with float32 the tile stays near the core.
_TILE_SCORES = 512_000


def run_tiles(run: Run, lists: Lists) -> Iterator[Tile]:
    """Yield the tiles of a run, always in the same order."""
    if not run.spans:
        return
    kv_heads = lists.keys[0].shape[1]
    groups = lists.query.shape[1] // kv_heads
    exact = torch.promote_types(lists.query.dtype, torch.float32)
    scores = run.rows * groups * sum(span.width for span in run.spans)
    step = kv_heads
    if lists.query.device.type == "cpu":
        threads = torch.get_num_threads()
        step = min(kv_heads, max(threads, _TILE_SCORES * threads // scores))
    for number, rows in run.chunks():
        part = slice(number, number + 1)
        biases = [span_bias(span, run, part, groups, lists.query) for span in run.spans]
        empty = empty_rows(run, part, groups, lists.query.device)
        for batch in range(lists.query.shape[0]):
            for head in range(0, kv_heads, step):
                kv = slice(head, min(head + step, kv_heads))
                spans = []
                for span, bias in zip(run.spans, biases, strict=True):
                    at = (batch, kv, span.keys(number))
                    key, value = lists.keys[span.piece][at].to(exact), lists.values[span.piece][at].to(exact)
                    give = None
                    if lists.dkeys is not None and lists.dvalues is not None:
                        give = partial(_add, lists.dkeys[span.piece][at], lists.dvalues[span.piece][at])
                    spans.append(TileSpan(key, value, bias, give=give))
                heads = slice(kv.start * groups, kv.stop * groups)
                yield Tile(partial(_rows, batch, heads, groups, rows), spans, empty)


def _rows(batch: int, heads: slice, groups: int, rows: slice, x: Tensor) -> Tensor:
    """View rows of x [B, H, Q, ...] as [H_kv, G, C, ...]."""
    return x[batch, heads, rows].unflatten(0, (-1, groups))


def _add(dkey: Tensor, dvalue: Tensor, key: Tensor, value: Tensor) -> None:
    dkey += key
    dvalue += value
