"""All members of a family at once: the residues of a stride are the tiles of one product, read where they lie.

A residue is a short sequence of tokens far apart. One after the other they leave the products small; the fused operator
takes them together, but is slower on sequences of a few hundred tokens than a tile of them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ...plan.pieces import Indices, Lattice
from .lists import Tensors
from .masks import empty_rows, span_bias
from .runs import Run
from .schedule import Group
from .tile import Tile
from .tiled import TileSpan

_SCORES = 1_800_000  # scores of the members computed at a time, measured at 128 members of 128 tokens


def run_members(run: Run, group: Group, tensors: Tensors, dropout: bool) -> Iterator[Tile]:
    """Yield the tiles of a run of every member, always in the same order; with dropout cut alike in both passes."""
    if not run.spans:
        return
    kv_heads = tensors.key.shape[1]
    groups = tensors.query.shape[1] // kv_heads
    exact = torch.promote_types(tensors.query.dtype, torch.float32)
    scores = run.rows * groups * sum(span.width for span in run.spans)
    inputs = (tensors.query.numel() + 2 * tensors.key.numel()) * tensors.query.element_size()
    share = 5 if tensors.dkey is None and not dropout else 15  # as for strips
    step = max(1, min(group.repeat, min(_SCORES, inputs // share // exact.itemsize) // scores))
    for number, rows in run.chunks():
        part = slice(number, number + 1)
        biases = [span_bias(span, run, part, groups, tensors.query) for span in run.spans]
        empty = empty_rows(run, part, groups, tensors.query.device)
        for batch in range(tensors.query.shape[0]):
            for head in range(kv_heads):
                for first in range(0, group.repeat, step):
                    count = min(step, group.repeat - first)
                    spans = []
                    for span, bias in zip(run.spans, biases, strict=True):
                        take = partial(
                            _keys, batch, head, group.keys[span.piece], span.keys(number), first, count
                        )
                        give = None
                        if tensors.dkey is not None and tensors.dvalue is not None:
                            give = partial(_add, take(tensors.dkey), take(tensors.dvalue))
                        key, value = take(tensors.key).to(exact), take(tensors.value).to(exact)
                        spans.append(TileSpan(key, value, bias, give=give))
                    heads = slice(head * groups, (head + 1) * groups)
                    yield Tile(partial(_rows, batch, heads, group.queries, rows, first, count), spans, empty)


def _rows(
    batch: int, heads: slice, queries: Indices, rows: slice, first: int, count: int, x: Tensor
) -> Tensor:
    """View rows of `count` members of x [B, H, N, ...] as [T, G, C, ...]."""
    assert isinstance(queries, Lattice)
    slab = x[batch, heads]
    per_head, per_token, *rest = slab.stride()
    start = queries.first + first + rows.start * queries.step
    return slab.as_strided(
        (count, slab.shape[0], rows.stop - rows.start, *slab.shape[2:]),
        (per_token, per_head, per_token * queries.step, *rest),
        slab.storage_offset() + start * per_token,
    )


def _keys(batch: int, head: int, keys: Indices, part: slice, first: int, count: int, x: Tensor) -> Tensor:
    """View keys of `count` members of x [B, H_kv, N, D] as [T, S, D]."""
    assert isinstance(keys, Lattice)
    slab = x[batch, head]
    per_token, across = slab.stride()
    start = keys.first + first + part.start * keys.step
    return slab.as_strided(
        (count, part.stop - part.start, slab.shape[1]),
        (per_token, per_token * keys.step, across),
        slab.storage_offset() + start * per_token,
    )


def _add(dkey: Tensor, dvalue: Tensor, key: Tensor, value: Tensor) -> None:
    dkey += key
    dvalue += value
