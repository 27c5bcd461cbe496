"""Many equal tiles of one head at once: the chunks of a long run, their keys an overlapping view.

Neighbouring chunks of a window read nearly the same keys. Taken together they find them in the cache, and one product
serves all; with a head's chunks apart, each reads them again from further away.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .lists import Lists
from .masks import empty_rows, span_bias
from .runs import Run, Span
from .tile import Tile
from .tiled import TileSpan

# Chunks of a run from which on a strip is faster than a tile of all heads, and scores of one strip: measured at 64 rows
# and a window of 512, where 32 to 48 chunks at once are best.
_FEWEST = 6
_STRIP_SCORES = 1_800_000


def in_strips(run: Run) -> bool:
    """True when the run is long enough."""
    return run.repeat >= _FEWEST


def run_strips(run: Run, lists: Lists, dropout: bool) -> Iterator[Tile]:
    """Yield the strips of a run, always in the same order; with dropout cut alike in both passes."""
    kv_heads = lists.keys[0].shape[1]
    groups = lists.query.shape[1] // kv_heads
    exact = torch.promote_types(lists.query.dtype, torch.float32)
    scores = run.rows * groups * sum(span.width for span in run.spans)
    # A share of the inputs' bytes at most, so that the workspace stays small for short sequences too; a backward pass
    # has three buffers of this size.
    inputs = (lists.query.numel() + 2 * lists.keys[0].numel()) * lists.query.element_size()
    share = 5 if lists.dkeys is None and not dropout else 15
    most = min(_STRIP_SCORES, inputs // share // exact.itemsize)
    chunks = max(1, min(run.repeat, most // scores))
    for number in range(0, run.repeat, chunks):
        part = slice(number, min(number + chunks, run.repeat))
        biases = [span_bias(span, run, part, groups, lists.query) for span in run.spans]
        empty = empty_rows(run, part, groups, lists.query.device)
        for batch in range(lists.query.shape[0]):
            for head in range(kv_heads):
                spans = [
                    _span(span, bias, part, lists, batch, head, exact)
                    for span, bias in zip(run.spans, biases, strict=True)
                ]
                place = partial(_rows, batch, slice(head * groups, (head + 1) * groups), run, part)
                yield Tile(place, spans, empty)


def _rows(batch: int, heads: slice, run: Run, part: slice, x: Tensor) -> Tensor:
    """View the strip's rows of x [B, H, Q, ...] as [T, G, C, ...]; G query heads of a key head, C rows."""
    slab = x[batch, heads, run.row + part.start * run.step :]
    per_head, per_row, *rest = slab.stride()
    return slab.as_strided(
        (part.stop - part.start, slab.shape[0], run.rows, *slab.shape[2:]),
        (run.step * per_row, per_head, per_row, *rest),
        slab.storage_offset(),
    )


def _span(
    span: Span, bias: Tensor | None, part: slice, lists: Lists, batch: int, head: int, exact: torch.dtype
) -> TileSpan:
    key, value = (x[span.piece][batch, head] for x in (lists.keys, lists.values))
    grads: tuple[Tensor, Tensor] | None = None
    if lists.dkeys is not None and lists.dvalues is not None:
        grads = lists.dkeys[span.piece][batch, head], lists.dvalues[span.piece][batch, head]
    give: partial[None] | None = None
    if span.step == 0:  # the same keys for all chunks
        rows = slice(span.first, span.first + span.width)
        if grads is not None:
            give = partial(_add_same, grads[0][rows], grads[1][rows])
        return TileSpan(key[rows].to(exact), value[rows].to(exact), bias, give=give)
    first, count = span.first + part.start * span.step, part.stop - part.start
    take = partial(_windows, step=span.step, count=count, dtype=exact)

    def wider(before: int) -> tuple[Tensor, Tensor] | None:
        if first < before:
            return None
        return take(key, first - before, span.width + before), take(
            value, first - before, span.width + before
        )

    if grads is not None:
        give = partial(_add_windows, grads[0], grads[1], first, span.step)
    return TileSpan(take(key, first, span.width), take(value, first, span.width), bias, wider, give)


def _windows(x: Tensor, first: int, width: int, *, step: int, count: int, dtype: torch.dtype) -> Tensor:
    """View x [K, D] as windows [count, width, D] that begin at first, first + step, ...; converted once if needed."""
    slab = x[first : first + (count - 1) * step + width].to(dtype)
    along, across = slab.stride()
    return slab.as_strided((count, width, x.shape[1]), (step * along, along, across), slab.storage_offset())


def _add_same(dkey: Tensor, dvalue: Tensor, key: Tensor, value: Tensor) -> None:
    dkey += key
    dvalue += value


def _add_windows(dkey: Tensor, dvalue: Tensor, first: int, step: int, key: Tensor, value: Tensor) -> None:
    for target, windows in ((dkey, key), (dvalue, value)):
        count, width, size = windows.shape
        along, across = target.stride()
        if count * step <= width:
            for number in range(count):
                start = first + number * step
                target[start : start + width] += windows[number]
            continue
        # Overlapping windows in slices one step wide, which do not overlap.
        for start in range(0, width, step):
            part = min(step, width - start)
            place = target.as_strided(
                (count, part, size),
                (step * along, along, across),
                target.storage_offset() + (first + start) * along,
            )
            place += windows[:, start : start + part]
