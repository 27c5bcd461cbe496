"""The `cuda_flash` backend: bands through the operators, merged by log-sum-exp; forward and backward exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...plan.pieces import Lattice
from ...plan.plan import HeadPlan, Plan
from ..call import Call, Inputs
from .bands import Band, bands_of
from .fold import add, fold, numbers, write
from .kernel import LARGEST_HEAD, flash_backward, flash_forward

_GRID = 65_535  # heads, residues included, that one launch of the kernel can take
_OLDEST = (8, 0)  # compute capability from which the kernels run


def unsupported(call: Call, inputs: Inputs, plans: list[Plan | None]) -> list[str]:
    """Return every reason why FlashAttention's operators cannot run this call; nothing where they can."""
    reasons = []
    if inputs.device.type != "cuda":
        reasons.append(f"the operators run on CUDA, not on {inputs.device.type}")
    elif torch.cuda.get_device_capability(inputs.device) < _OLDEST:
        reasons.append("the operators need a device of compute capability 8.0 or newer")
    if inputs.dtype not in (torch.float16, torch.bfloat16):
        name = str(inputs.dtype).removeprefix("torch.")
        reasons.append(f"the operators take float16 and bfloat16, not {name}")
    if inputs.head_size > LARGEST_HEAD:
        reasons.append(f"head size {inputs.head_size} is above {LARGEST_HEAD}")
    if call.softcap is not None:
        reasons.append(f"the operators have no soft-cap (here {call.softcap})")
    if inputs.sinks:
        reasons.append("the operators are not merged with learned sinks here")
    if call.dropout:
        reasons.append(f"dropout of attention weights (here {call.dropout}) does not merge over parts")
    groups = [(plan, group) for plan in plans if plan is not None for group in plan.groups]
    for plan, group in groups:
        bands = bands_of(plan, group)
        reasons += [reason for reason in bands.reasons if reason not in reasons]
        most = max((band.repeat for band in bands.merged), default=1) * len(group.heads)
        if most > _GRID:
            reasons.append(f"a stride gives {most} heads and residues, more than {_GRID}")
    return reasons


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, call: Call, plan: Plan, group: HeadPlan
) -> Tensor:
    """Return the attention [B, h, Q, Dv] of one sequence's heads `group.heads`; `unsupported` is empty.

    Args:
        query: [B, h, Q, D]; key: [B, h_kv, K, D]; value: [B, h_kv, K, Dv], of one half-precision dtype.
    """
    scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
    bands = bands_of(plan, group)
    out = _Bands.apply(query, key, value, bands.merged, scale)
    for band in bands.placed:
        part = _Bands.apply(query, key, value, (band,), scale)
        rows = numbers(band.queries, query.device)
        out = out.index_copy(2, rows, part.index_select(2, rows))
    return out


class _Bands(torch.autograd.Function):
    """The merged result of several bands over disjoint pairs; rows in none of them are 0."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bands: tuple[Band, ...], scale: float
    ) -> Tensor:
        q_len = query.shape[2]
        ctx.bands, ctx.scale = bands, scale
        # Half precision is rounded once, after the last band.
        exact = torch.promote_types(query.dtype, torch.float32)
        dtype = exact if len(bands) > 1 else query.dtype
        # A band of all queries comes first: its result is taken as it is, not written over zeros.
        every = Lattice(0, q_len)
        ordered = sorted(bands, key=lambda band: band.queries != every)
        out, lse = None, None
        for band in ordered:
            q, k, v = _folded(query, key, value, band)
            o, part = flash_forward(q, k, v, left=band.left, right=band.right, scale=scale)
            if lse is None and band.queries == every:
                out, lse = o.to(dtype).transpose(1, 2), part
                continue
            if out is None or lse is None:
                out, lse = _empty(query, value, dtype, exact)
            if len(bands) > 1:
                before = fold(out, band.queries, band.repeat), _rows(lse, band)
                o, part = _merged(*before, o, part)
            write(out, band.queries, band.repeat, o)
            write(lse[..., None], band.queries, band.repeat, part.transpose(1, 2)[..., None])
        if out is None or lse is None:
            out, lse = _empty(query, value, dtype, exact)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        dtype = torch.promote_types(query.dtype, torch.float32) if len(ctx.bands) > 1 else query.dtype
        dquery, dkey, dvalue = (_zeros(x, dtype) for x in (query, key, value))
        for band in ctx.bands:
            q, k, v = _folded(query, key, value, band)
            g, o = (fold(x, band.queries, band.repeat) for x in (grad, out))
            options = {"left": band.left, "right": band.right, "scale": ctx.scale}
            dq, dk, dv = flash_backward(g, q, k, v, o, _rows(lse, band), **options)
            add(dquery, band.queries, band.repeat, dq)
            add(dkey, band.keys, band.repeat, dk)
            add(dvalue, band.keys, band.repeat, dv)
        return dquery.to(query.dtype), dkey.to(key.dtype), dvalue.to(value.dtype), None, None


def _empty(query: Tensor, value: Tensor, dtype: torch.dtype, exact: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp of queries that see nothing: 0 and -inf."""
    batch, heads, q_len, _ = query.shape
    out = query.new_zeros((batch, q_len, heads, value.shape[-1]), dtype=dtype).transpose(1, 2)
    return out, query.new_full((batch, heads, q_len), float("-inf"), dtype=exact)


def _folded(query: Tensor, key: Tensor, value: Tensor, band: Band) -> tuple[Tensor, Tensor, Tensor]:
    """Return a band's queries, keys and values in the operators' layout [B, N, H, D]."""
    q = fold(query, band.queries, band.repeat)
    return q, fold(key, band.keys, band.repeat), fold(value, band.keys, band.repeat)


def _rows(lse: Tensor, band: Band) -> Tensor:
    """Return the band's part [B, members * H, n] of lse [B, H, Q]."""
    return fold(lse[..., None], band.queries, band.repeat)[..., 0].transpose(1, 2)


def _merged(out: Tensor, lse: Tensor, o: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    """Return output [B, n, H, D] and log-sum-exp [B, H, n] over both sets of keys; either may be empty (-inf)."""
    top = torch.maximum(lse, part)
    top = top.masked_fill(top == float("-inf"), 0.0)
    a, b = (lse - top).exp(), (part - top).exp()
    total = a + b
    share = (b / total.clamp_min(torch.finfo(total.dtype).tiny)).transpose(1, 2)[..., None]
    return torch.lerp(out, o.to(out.dtype), share), top + total.log()


def _zeros(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros of x's shape [B, H, N, D] in the host's layout [B, N, H, D]."""
    batch, heads, length, width = x.shape
    return x.new_zeros((batch, length, heads, width), dtype=dtype).transpose(1, 2)
