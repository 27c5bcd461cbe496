"""The `torch` backend as one differentiable function: sequences of a batch, one pass each per view."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...plan.plan import Plan
from ...plan.segments import Segments
from ...selectors import BucketSelection
from ..call import Call
from ..selected import Selected, counts_pairs
from .buckets import ScatteredTile, run_buckets
from .chosen import run_chosen
from .heads import head_blocks
from .lists import Tensors
from .merge import join_sinks, share_of
from .step import is_step, step_attention
from .tile import Tile
from .tiled import Tiled
from .view import View
from .walk import Pass, make_pass, needs_merging


def torch_attention(
    views: Sequence[View],
    value: Tensor,
    call: Call,
    segments: Segments,
    sinks: Tensor | None = None,
    selected: Sequence[Selected | None] | None = None,
) -> Tensor:
    """Return the attention [B, H, Q, Dv] of one call; the tensors share one dtype, but `sinks` [H] are never half.

    selected: for each sequence the blocks that are read besides the pairs of its plan, which are none of them.
    """
    selected = [None] * len(segments.entries) if selected is None else list(selected)
    # Of a longer call every sequence may have one query too, where the rest is padding.
    counted = counts_pairs(chosen.selection for chosen in selected if chosen is not None)
    plans_of_all = [plan for view in views for plan in view.plans]
    if views[0].query.shape[2] == 1 and not counted and is_step(call, plans_of_all):
        return step_attention(views, value, call, segments, sinks, selected)
    # The host's generator, so that gradient checkpointing, which restores it, draws the same masks again.
    seed = int(torch.randint(2**62, ()).item()) if call.dropout else 0
    plans = [view.plans for view in views]
    scored = (x for view in views for x in view[:2])
    return _Attention.apply(value, sinks, call, segments, plans, selected, seed, *scored)


class _Attention(torch.autograd.Function):
    """value: [B, H_kv, K, Dv]; sinks: [H] or None; scored: query and key of each view in turn; plans: of each."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        sinks: Tensor | None,
        call: Call,
        segments: Segments,
        plans: list[list[Plan | None]],
        selected: list[Selected | None],
        seed: int,
        *scored: Tensor,
    ) -> Tensor:
        ctx.call, ctx.segments, ctx.plans, ctx.selected, ctx.seed = call, segments, plans, selected, seed
        ctx.with_sinks = sinks is not None
        views = _views(ctx, scored)
        batch, heads, q_len, _ = scored[0].shape
        exact = torch.promote_types(value.dtype, torch.float32)
        layout = (batch, q_len, heads, value.shape[-1])
        # Half precision is rounded once, after the last piece.
        merging = sinks is not None or any(selected) or _merges(views, call)
        out = value.new_empty(layout, dtype=exact if merging else value.dtype).transpose(1, 2)
        lse = value.new_empty((batch, heads, q_len), dtype=exact)
        if not segments.is_whole:
            out.zero_()
        for number, segment in enumerate(segments.entries):
            rows, slots, at = segment.rows, segment.slots, segment.queries(q_len, value.shape[2])
            own = _with_pairs(views, number)
            if not own:
                continue
            v, o, part = value[rows, :, slots], out[rows, :, at], lse[rows, :, at]
            for index in own:
                query, key, _ = views[index]
                whole = Tensors(query[rows, :, at], key[rows, :, slots], v, o, part)
                for step, tensors in _passes(ctx, number, index, own, whole):
                    step.forward(tensors)
                for tiled, tile in _chosen(ctx, number, index, whole):
                    tile.forward(tiled, whole.query, whole.out, whole.lse, True, True)
            if sinks is not None:
                join_sinks(o, part, sinks)
            if not isinstance(slots, slice):  # a sequence with holes was gathered
                out[rows, :, at] = o
                lse[rows, :, at] = part
        out = out.to(value.dtype)
        ctx.save_for_backward(value, out, lse, sinks, *scored)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise ValueError(
                "the torch backend has no second derivatives, got create_graph=True; use backend='reference'"
            )
        value, out, lse, sinks, *scored = ctx.saved_tensors
        views = _views(ctx, scored)
        q_len, k_len = out.shape[2], value.shape[2]
        exact = torch.promote_types(value.dtype, torch.float32)
        dvalue = _like(value, exact, torch.zeros)
        dsinks = None if sinks is None else torch.zeros_like(sinks)
        shares: list[tuple[Tensor, Tensor]] = []
        for view in views:
            merging = any(ctx.selected) or _merges([view], ctx.call)
            dquery = _like(view.query, exact if merging else value.dtype, torch.empty)
            if not ctx.segments.is_whole:
                dquery.zero_()
            shares.append((dquery, _like(view.key, exact, torch.zeros)))
        for number, segment in enumerate(ctx.segments.entries):
            rows, slots, at = segment.rows, segment.slots, segment.queries(q_len, k_len)
            own = _with_pairs(views, number)
            if not own:
                continue
            g, o, part = grad[rows, :, at], out[rows, :, at], lse[rows, :, at]
            v, dv = value[rows, :, slots], dvalue[rows, :, slots]
            if dsinks is not None:  # a softmax's gradient, for a value of 0
                dsinks -= (share_of(sinks[:, None], part) * (g.to(exact) * o).sum(-1)).sum((0, 2))
            for index in own:
                (query, key, _), (dquery, dkey) = views[index], shares[index]
                q, k, dq, dk = (
                    query[rows, :, at],
                    key[rows, :, slots],
                    dquery[rows, :, at],
                    dkey[rows, :, slots],
                )
                whole = Tensors(q, k, v, o, part, g, dq, dk, dv)
                for step, tensors in _passes(ctx, number, index, own, whole):
                    step.backward(tensors)
                for tiled, tile in _chosen(ctx, number, index, whole):
                    tile.backward(tiled, g, q, o, part, dq, False, False)
                if not isinstance(slots, slice):
                    dquery[rows, :, at], dkey[rows, :, slots] = dq, dk
            if not isinstance(slots, slice):
                dvalue[rows, :, slots] = dv
        scored_shares = (x.to(value.dtype) for share in shares for x in share)
        return dvalue.to(value.dtype), dsinks, None, None, None, None, None, *scored_shares


def _views(ctx: Any, scored: Sequence[Tensor]) -> list[View]:
    return [View(scored[2 * n], scored[2 * n + 1], plans) for n, plans in enumerate(ctx.plans)]


def _with_pairs(views: list[View], number: int) -> list[int]:
    """Return the views that hold pairs of sequence `number`."""
    return [index for index, view in enumerate(views) if view.plans[number] is not None]


def _passes(
    ctx: Any, number: int, index: int, own: list[int], tensors: Tensors
) -> Iterator[tuple[Pass, Tensors]]:
    """Yield the passes of view `index` over sequence `number`, one per block of heads, with views of its tensors.

    own: the views that hold pairs of the sequence.
    """
    plan = ctx.plans[index][number]
    seed = ctx.seed + ((number * len(ctx.plans) + index) << 40)
    for group in plan.groups:
        for block in head_blocks(group.heads, tensors.query.shape[1] // tensors.key.shape[1]):
            heads = tensors.heads(block.query, block.key)
            query, key, merges = heads.query, heads.key, index != own[0]
            shares_rows = len(own) > 1 or ctx.with_sinks or ctx.selected[number] is not None
            yield make_pass(group, block.first, query, key, ctx.call, seed, shares_rows, merges), heads
            seed += 1 << 32


def _chosen(
    ctx: Any, number: int, index: int, tensors: Tensors
) -> Iterator[tuple[Tiled, Tile | ScatteredTile]]:
    """Yield the tiles of what was selected for sequence `number`, which the first view scores."""
    chosen, call = ctx.selected[number], ctx.call
    if chosen is None or index:
        return
    scale = tensors.query.shape[-1] ** -0.5 if call.scale is None else call.scale
    tiled = Tiled(scale, call.softcap, call.dropout, ctx.seed + ((1 << 60) + (number << 40)))
    own = chosen.selection
    tiles: Iterator[Tile | ScatteredTile] = (
        run_buckets(chosen, own, tensors) if isinstance(own, BucketSelection) else run_chosen(chosen, tensors)
    )
    for tile in tiles:
        yield tiled, tile


def _merges(views: list[View], call: Call) -> bool:
    """True when some row's result comes from several views or groups of pieces and is merged in memory."""
    for plans in zip(*(view.plans for view in views), strict=True):
        found = [(view, plan) for view, plan in zip(views, plans, strict=True) if plan is not None]
        if len(found) > 1:
            return True
        for view, plan in found:
            if any(needs_merging(group, call, view.query, view.key, plan.q_len) for group in plan.groups):
                return True
    return False


def _like(x: Tensor, dtype: torch.dtype, make: Any) -> Tensor:
    """Return a tensor of x's shape [B, H, N, D] in the host's layout [B, N, H, D]."""
    batch, heads, length, width = x.shape
    return make((batch, length, heads, width), dtype=dtype, device=x.device).transpose(1, 2)
