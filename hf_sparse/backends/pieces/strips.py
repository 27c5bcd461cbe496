"""Many equal tiles of one head at once: the chunks of a long run, their keys an overlapping view.

Neighbouring chunks of a window read nearly the same keys. Taken together they find them in the cache, and one product
serves all; with a head's chunks apart, each reads them again from further away.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .schedule import Run
from .tiled import TileSpan
from .tiles import run_bias

# Chunks of a run from which on a strip is faster than a tile of all heads, and scores of one strip: measured at 64 rows
# and a window of 512, where 32 to 48 chunks at once are best.
_FEWEST = 8
_STRIP_SCORES = 1_800_000


@dataclass(frozen=True)
class Strip:
    """`chunks` chunks of one key head: query `heads` of `batch` row, query `rows`, and what they read.

    spans: keys and values as views [chunks, S, D or Dv].
    """

    batch: int
    heads: slice
    rows: slice
    chunks: int
    spans: list[TileSpan]

    def take(self, x: Tensor) -> Tensor:
        """Return the strip's part of x [B, H, Q, D] as [chunks, M, D], M = rows of all its heads."""
        return self._part(x).transpose(0, 1).reshape(self.chunks, -1, x.shape[-1])

    def put(self, x: Tensor, result: Tensor) -> None:
        """Write `result` [chunks, M, D] to the strip's part of x [B, H, Q, D]."""
        place = self._part(x)
        place.copy_(result.view(self.chunks, place.shape[0], -1, x.shape[-1]).transpose(0, 1))

    def _part(self, x: Tensor) -> Tensor:
        return x[self.batch, self.heads, self.rows].unflatten(1, (self.chunks, -1))


def in_strips(run: Run) -> bool:
    """True when the run is long and regular enough."""
    return run.repeat >= _FEWEST and run.empty is None and bool(run.spans)


def run_strips(run: Run, query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Iterator[Strip]:
    """Yield the strips of a run; tensors as in `run_tiles`."""
    kv_heads = keys[0].shape[1]
    groups = query.shape[1] // kv_heads
    biases = [run_bias(span, groups, run, query) for span in run.spans]
    scores = run.rows * groups * sum(span.width for span in run.spans)
    exact = torch.promote_types(query.dtype, torch.float32)
    # At most a quarter of the inputs' bytes, so that the workspace stays small for short sequences too.
    inputs = (query.numel() + 2 * keys[0].numel()) * query.element_size()
    most = min(_STRIP_SCORES, inputs // 4 // exact.itemsize)
    chunks = max(1, min(run.repeat, most // scores))
    for batch in range(query.shape[0]):
        for head in range(kv_heads):
            for number in range(0, run.repeat, chunks):
                count = min(chunks, run.repeat - number)
                first = run.row + number * run.rows
                spans = []
                for span, bias in zip(run.spans, biases, strict=True):
                    start = span.first + number * span.step
                    key, value = (
                        _windows(x[batch, head], start, span.width, span.step, count, exact)
                        for x in (keys[span.piece], values[span.piece])
                    )
                    spans.append(TileSpan(key, value, bias))
                heads = slice(head * groups, (head + 1) * groups)
                yield Strip(batch, heads, slice(first, first + count * run.rows), count, spans)


def _windows(x: Tensor, first: int, width: int, step: int, count: int, dtype: torch.dtype) -> Tensor:
    """View x [K, D] as windows [count, width, D] that begin at first, first + step, ...; converted once if needed."""
    slab = x[first : first + (count - 1) * step + width].to(dtype)
    along, across = slab.stride()
    return slab.as_strided((count, width, x.shape[1]), (step * along, along, across), slab.storage_offset())
