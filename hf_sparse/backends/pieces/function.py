"""The `torch` backend as one differentiable function: sequences of a batch, one pass each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...plan.plan import Plan
from ...plan.segments import Segment, Segments
from ..call import Call
from .heads import head_blocks
from .lists import Tensors
from .step import is_step, step_attention
from .walk import Pass, make_pass, needs_merging


def torch_attention(
    query: Tensor, key: Tensor, value: Tensor, call: Call, segments: Segments, plans: list[Plan | None]
) -> Tensor:
    """Return the attention [B, H, Q, Dv] of one call; the tensors share one dtype."""
    if is_step(call, plans):
        return step_attention(query, key, value, call.scale, segments, plans)
    # The host's generator, so that gradient checkpointing, which restores it, draws the same masks again.
    seed = int(torch.randint(2**62, ()).item()) if call.dropout else 0
    return _Attention.apply(query, key, value, call, segments, plans, seed)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: Call,
        segments: Segments,
        plans: list[Plan | None],
        seed: int,
    ) -> Tensor:
        batch, heads, q_len, _ = query.shape
        exact = torch.promote_types(query.dtype, torch.float32)
        merging = any(plan is not None and _merges(plan, call, query, key) for plan in plans)
        layout = (batch, q_len, heads, value.shape[-1])
        # Half precision is rounded once, after the last piece.
        out = query.new_empty(layout, dtype=exact if merging else query.dtype).transpose(1, 2)
        lse = query.new_empty((batch, heads, q_len), dtype=exact)
        if not segments.is_whole:
            out.zero_()
        ctx.call, ctx.segments, ctx.plans, ctx.seed = call, segments, plans, seed
        for number, segment, plan in _sequences(ctx):
            rows, slots, at = segment.rows, segment.slots, segment.queries(q_len, key.shape[2])
            q, k, v = query[rows, :, at], key[rows, :, slots], value[rows, :, slots]
            o, part = out[rows, :, at], lse[rows, :, at]
            for step, tensors in _passes(ctx, number, plan, Tensors(q, k, v, o, part)):
                step.forward(tensors)
            if not isinstance(slots, slice):  # a sequence with holes was gathered
                out[rows, :, at] = o
                lse[rows, :, at] = part
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise ValueError(
                "the torch backend has no second derivatives, got create_graph=True; use backend='reference'"
            )
        query, key, value, out, lse = ctx.saved_tensors
        q_len, k_len = query.shape[2], key.shape[2]
        exact = torch.promote_types(query.dtype, torch.float32)
        merging = any(plan is not None and _merges(plan, ctx.call, query, key) for plan in ctx.plans)
        dquery = _like(query, exact if merging else query.dtype, torch.empty)
        if not ctx.segments.is_whole:
            dquery.zero_()
        dkey, dvalue = _like(key, exact, torch.zeros), _like(value, exact, torch.zeros)
        for number, segment, plan in _sequences(ctx):
            rows, slots, at = segment.rows, segment.slots, segment.queries(q_len, k_len)
            q, k, v = query[rows, :, at], key[rows, :, slots], value[rows, :, slots]
            g, o, part = grad[rows, :, at], out[rows, :, at], lse[rows, :, at]
            dq, dk, dv = dquery[rows, :, at], dkey[rows, :, slots], dvalue[rows, :, slots]
            whole = Tensors(q, k, v, o, part, g, dq, dk, dv)
            for step, tensors in _passes(ctx, number, plan, whole):
                step.backward(tensors)
            if not isinstance(slots, slice):
                dquery[rows, :, at], dkey[rows, :, slots], dvalue[rows, :, slots] = dq, dk, dv
        return dquery.to(query.dtype), dkey.to(key.dtype), dvalue.to(value.dtype), None, None, None, None


def _sequences(ctx: Any) -> Iterator[tuple[int, Segment, Plan]]:
    """Yield the sequences that have queries, numbered, with their plans."""
    for number, (segment, plan) in enumerate(zip(ctx.segments.entries, ctx.plans, strict=True)):
        if plan is not None:
            yield number, segment, plan


def _passes(ctx: Any, number: int, plan: Plan, tensors: Tensors) -> Iterator[tuple[Pass, Tensors]]:
    """Yield the passes of sequence `number`, one per block of heads, with views of its tensors."""
    seed = ctx.seed + (number << 40)
    for group in plan.groups:
        for block in head_blocks(group.heads, tensors.query.shape[1] // tensors.key.shape[1]):
            own = tensors.heads(block.query, block.key)
            yield make_pass(group, block.first, own.query, own.key, ctx.call, seed), own
            seed += 1 << 32


def _merges(plan: Plan, call: Call, query: Tensor, key: Tensor) -> bool:
    return any(needs_merging(group, call, query, key, plan.q_len) for group in plan.groups)


def _like(x: Tensor, dtype: torch.dtype, make: Any) -> Tensor:
    """Return a tensor of x's shape [B, H, N, D] in the host's layout [B, N, H, D]."""
    batch, heads, length, width = x.shape
    return make((batch, length, heads, width), dtype=dtype, device=x.device).transpose(1, 2)
