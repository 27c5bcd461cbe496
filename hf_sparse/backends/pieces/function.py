"""The `torch` backend as one differentiable function: sequences of a batch, one pass each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...plan.plan import Plan
from ...plan.segments import Segments
from ..call import Call
from .walk import Pass, make_pass, needs_merging


def torch_attention(
    query: Tensor, key: Tensor, value: Tensor, call: Call, segments: Segments, plans: list[Plan | None]
) -> Tensor:
    """Return the attention [B, H, Q, Dv] of one call; the tensors share one dtype."""
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
        merging = any(plan is not None and needs_merging(plan, call, query, key) for plan in plans)
        layout = (batch, q_len, heads, value.shape[-1])
        # Half precision is rounded once, after the last piece.
        out = query.new_empty(layout, dtype=exact if merging else query.dtype).transpose(1, 2)
        lse = query.new_empty((batch, heads, q_len), dtype=exact)
        if not segments.is_whole:
            out.zero_()
        ctx.call, ctx.segments, ctx.plans, ctx.seed = call, segments, plans, seed
        want_lse = any(ctx.needs_input_grad)
        for step, (out_view, lse_view, target) in _passes(ctx, query, key, value, out, lse, want_lse):
            step.forward()
            if target is not None:
                rows, queries = target
                out[rows, :, queries] = out_view
                lse[rows, :, queries] = lse_view
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        exact = torch.promote_types(query.dtype, torch.float32)
        merging = any(plan is not None and needs_merging(plan, ctx.call, query, key) for plan in ctx.plans)
        dquery = _like(query, exact if merging else query.dtype, torch.empty)
        if not ctx.segments.is_whole:
            dquery.zero_()
        dkey, dvalue = _like(key, exact, torch.zeros), _like(value, exact, torch.zeros)
        for (step, (_, _, target)), segment in zip(
            _passes(ctx, query, key, value, out, lse, True),
            (s for s, plan in zip(ctx.segments.entries, ctx.plans, strict=True) if plan is not None),
            strict=True,
        ):
            rows, slots = segment.rows, segment.slots
            at = segment.queries(query.shape[2], key.shape[2])
            if target is None:
                step.backward(
                    grad[rows, :, at], dquery[rows, :, at], dkey[rows, :, slots], dvalue[rows, :, slots]
                )
                continue
            parts = [torch.zeros_like(x, dtype=exact) for x in (step.query, step.key, step.value)]
            step.backward(grad[rows, :, at], *parts)
            dquery[rows, :, at] = parts[0].to(dquery.dtype)
            dkey[rows, :, slots] = parts[1]
            dvalue[rows, :, slots] = parts[2]
        return dquery.to(query.dtype), dkey.to(key.dtype), dvalue.to(value.dtype), None, None, None, None


Target = tuple[slice, Tensor] | None


def _passes(
    ctx: Any, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, want_lse: bool
) -> Iterator[tuple[Pass, tuple[Tensor, Tensor, Target]]]:
    """Yield the pass of every sequence that has queries, on views of the tensors.

    Where the slots of a sequence have holes its tensors are gathered instead; the target then says where its output
    belongs.
    """
    for number, (segment, plan) in enumerate(zip(ctx.segments.entries, ctx.plans, strict=True)):
        if plan is None:
            continue
        rows, slots = segment.rows, segment.slots
        queries = segment.queries(query.shape[2], key.shape[2])
        q, k, v = query[rows, :, queries], key[rows, :, slots], value[rows, :, slots]
        o, part = out[rows, :, queries], lse[rows, :, queries]
        target = None if isinstance(slots, slice) else (rows, queries)
        seed = ctx.seed + (number << 32)
        yield make_pass(q, k, v, o, part, plan, ctx.call, seed, want_lse), (o, part, target)


def _like(x: Tensor, dtype: torch.dtype, make: Any) -> Tensor:
    """Return a tensor of x's shape [B, H, N, D] in the host's layout [B, N, H, D]."""
    batch, heads, length, width = x.shape
    return make((batch, length, heads, width), dtype=dtype, device=x.device).transpose(1, 2)
