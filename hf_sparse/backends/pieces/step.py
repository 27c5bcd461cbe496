"""One query per sequence, the decoding step: the few keys it reads are scored together for all rows of the batch.

Matrix products read views in place, and lists of keys stay apart until their scores stand in one row: nothing is copied
but what has to be gathered or, in half precision, widened, and, where several rows meet heads that see different keys,
what one product cannot read as evenly spaced. Where one view is all, the fused operator saves a few calls; in half
precision it is several times slower than widening.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...plan.plan import Plan
from ...plan.segments import Segment, Segments
from ..call import Call
from ..selected import Selected
from .chosen_step import chosen_fetch
from .fetch import Fetch, fetches_of
from .heads import HeadBlock, head_blocks
from .view import View


def is_step(call: Call, plans: Sequence[Plan | None]) -> bool:
    """True where every sequence has one query, and nothing but the keys it reads is asked for."""
    queries = [plan for plan in plans if plan is not None]
    return bool(queries) and all(plan.reads is not None for plan in queries) and not call.dropout


def step_attention(
    views: Sequence[View],
    value: Tensor,
    call: Call,
    segments: Segments,
    sinks: Tensor | None = None,
    selected: Sequence[Selected | None] = (),
) -> Tensor:
    """Return the attention [B, H, 1, Dv] of one query per sequence; every plan has `reads`; sinks: [H].

    Slots that no row of the batch reads are not read, unless they lie between some that are: those must be finite.
    """
    query, key, _ = views[0]
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    plans = tuple(tuple(view.plans) for view in views)
    known = ("step", plans, groups, key.device)
    if known not in segments.memo:
        segments.memo[known] = _layout(segments, plans, heads, groups, key.device)
    layout: _Layout = segments.memo[known]
    chosen = chosen_fetch(segments, selected, heads, groups, key.device) if any(selected) else None
    if layout.is_whole:
        ((block, fetches),) = layout.blocks
        if chosen is not None:
            fetches = [(*fetches[0], chosen), *fetches[1:]]
        return _attend(views, value, call, layout.rows, block, fetches, sinks)
    out = value.new_zeros((query.shape[0], heads, 1, value.shape[-1]))
    for block, fetches in layout.blocks:
        if chosen is not None:
            fetches = [(*fetches[0], chosen.of(block.query, block.key, groups)), *fetches[1:]]
        out[layout.rows, block.query] = _attend(views, value, call, layout.rows, block, fetches, sinks)
    return out


@dataclass(frozen=True, eq=False)
class _Layout:
    """Which keys are read in one step.

    rows: those with a query, R of them.
    blocks: blocks of heads, and the keys that each reads, view by view.
    is_whole: one block is all heads of all rows of the batch.
    """

    rows: slice | Tensor
    blocks: list[tuple[HeadBlock, list[tuple[Fetch, ...]]]]
    is_whole: bool


def _layout(
    segments: Segments,
    plans: tuple[tuple[Plan | None, ...], ...],
    heads: int,
    groups: int,
    device: torch.device,
) -> _Layout:
    numbers = [n for n in range(len(segments.entries)) if any(own[n] is not None for own in plans)]
    entries = [segments.entries[n] for n in numbers]
    reads = [[() if (plan := own[n]) is None else plan.reads or () for n in numbers] for own in plans]
    blocks = []
    for alike in _alike(frozenset(tuple(r.heads for r in one) for own in reads for one in own), heads):
        for block in head_blocks(alike, groups):
            span = range(block.query.start, block.query.stop, block.query.step)
            kv_heads = len(range(block.key.start, block.key.stop, block.key.step))
            fetches = []
            for own in reads:
                mine = [next((r for r in one if span[0] in r.heads), None) for one in own]
                fetches.append(fetches_of(list(zip(entries, mine, strict=True)), span, kv_heads, device))
            blocks.append((block, fetches))
    rows = _rows(entries, device)
    is_whole = (
        isinstance(rows, slice)
        and rows == slice(0, segments.batch)
        and len(blocks) == 1
        and blocks[0][0].count == heads
    )
    return _Layout(rows, blocks, is_whole)


def _rows(entries: list[Segment], device: torch.device) -> slice | Tensor:
    """Return the rows of the sequences, a slice where they follow each other."""
    if all(after.rows.start == before.rows.stop for before, after in pairwise(entries)):
        return slice(entries[0].rows.start, entries[-1].rows.stop)
    numbers = np.concatenate([np.arange(entry.rows.start, entry.rows.stop) for entry in entries])
    return torch.from_numpy(numbers).to(device, non_blocking=True)


@lru_cache(maxsize=256)
def _alike(partitions: frozenset[tuple[tuple[int, ...], ...]], heads: int) -> list[tuple[int, ...]]:
    """Return the heads in groups that every partition of them keeps together; an empty one says nothing."""
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for head in range(heads):
        own = tuple(part for partition in partitions for part in partition if head in part)
        groups.setdefault(own, []).append(head)
    return [tuple(numbers) for numbers in groups.values()]


def _attend(
    views: Sequence[View],
    value: Tensor,
    call: Call,
    rows: slice | Tensor,
    heads: HeadBlock,
    fetches: list[tuple[Fetch, ...]],
    sinks: Tensor | None,
) -> Tensor:
    """Return the attention [R, h, 1, Dv] of one block of heads over what they read."""
    exact = torch.promote_types(value.dtype, torch.float32)
    scale = views[0].query.shape[-1] ** -0.5 if call.scale is None else call.scale
    only = fetches[0][0] if sinks is None and [len(own) for own in fetches] == [1] else None
    if only is not None and only.is_view and call.softcap is None and exact == value.dtype:
        keys, seen = (x[rows, heads.key, only.slots] for x in (views[0].key, value))
        own_rows = views[0].query[rows, heads.query].unflatten(1, (keys.shape[1], -1)).squeeze(3)
        fused = scaled_dot_product_attention(own_rows, keys, seen, scale=scale)
        return fused.flatten(1, 2)[:, :, None]
    read = [(view, fetch) for view, own in zip(views, fetches, strict=True) for fetch in own]
    scores = []
    for view, fetch in read:
        query = view.query[rows, heads.query, 0].to(exact)
        score = fetch.scores(query, view.key, rows, heads.key) * scale  # [R, H_kv, G, m]
        if call.softcap is not None:
            score = call.softcap * torch.tanh(score / call.softcap)
        if fetch.allowed is not None:
            score = score.masked_fill(~fetch.allowed, float("-inf"))
        scores.append(score)
    if sinks is not None:  # one more column, whose weight goes to no value
        column = sinks[heads.query].view(scores[0].shape[1:3])[None, ..., None]
        scores.append(column.expand_as(scores[0][..., :1]))
    weights = (
        torch.cat(scores, -1).softmax(-1).split([score.shape[-1] for score in scores], -1)
        if len(scores) > 1
        else (scores[0].softmax(-1),)  # a query reads at least itself
    )
    parts = [
        fetch.sums(weight, value, rows, heads.key)
        for (_, fetch), weight in zip(read, weights, strict=sinks is None)
    ]
    out = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    return out.flatten(1, 2)[:, :, None].to(value.dtype)
