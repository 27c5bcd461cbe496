"""The `flex` backend: a compiled FlexAttention call per order of queries, several of them merged by log-sum-exp."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ...plan.pieces import Indices, Lattice
from ...plan.plan import HeadPlan, Plan
from ...selectors import AnySelection, Selection
from ..call import Call, Inputs
from .blocks import block_tables
from .bounds import sorting
from .kernel import LARGEST_HEAD, SMALLEST_HEAD, padded_length, run_kernel
from .masks import mask_of, tile_reasons
from .orders import BLOCK, Order, orders_of
from .selected import NO_LISTS, selected_reasons, union_mask

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WIDE = ("cpu",)  # devices whose kernels take tables as wide as the key axis only


def unsupported(
    call: Call,
    inputs: Inputs,
    plans: list[Plan | None],
    selections: Sequence[AnySelection | None] | None = None,
) -> list[str]:
    """Return every reason why FlexAttention cannot run this call; nothing where it can.

    selections: where `inputs.selected`, what is read of each sequence, None for one without; None for all where it is
        known only that they are no lists of blocks.
    """
    reasons = []
    device = inputs.device.type
    if device not in ("cuda", "cpu"):
        reasons.append(f"FlexAttention runs on CUDA, and without gradients on the CPU, not on {device}")
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        reasons.append("FlexAttention is compiled by Triton, which is not installed")
    if inputs.dtype not in _DTYPES:
        name = str(inputs.dtype).removeprefix("torch.")
        reasons.append(f"FlexAttention takes float32, float16 and bfloat16, not {name}")
    if device == "cuda" and inputs.head_size > LARGEST_HEAD:
        reasons.append(
            f"head size {inputs.head_size} is above {LARGEST_HEAD}, for which the kernel's tiles are made"
        )
    if call.dropout:
        reasons.append(f"FlexAttention has no dropout of attention weights (here {call.dropout})")
    if device == "cpu" and inputs.gradients:
        reasons.append("FlexAttention has no backward pass on the CPU")
    if any(plan is not None and plan.columns is not None for plan in plans):
        # Its bounds are arithmetic on one axis of positions.
        return [*reasons, "FlexAttention has no calls over a cache whose old keys are held apart"]
    if inputs.selected and selections is None:
        reasons.append(NO_LISTS)
    chosen = [None] * len(plans) if selections is None else selections
    both = [(plan, own) for plan, own in zip(plans, chosen, strict=True) if plan is not None]
    reasons += dict.fromkeys(
        reason for plan, own in both if own is not None for reason in selected_reasons(own, plan)
    )
    groups = [(plan, group, own is not None) for plan, own in both for group in plan.groups]
    if device == "cpu" and inputs.sinks:
        reasons.append("on the CPU FlexAttention does not return what learned sinks are merged with")
    if device == "cpu" and any(len(orders_of(*group).merged) > 1 for group in groups):
        reasons.append(
            "the pattern needs several calls, and on the CPU FlexAttention does not return what merges them"
        )
    reasons += dict.fromkeys(
        r for _, group, _ in groups for tiles in group.tiles for r in tile_reasons(tiles)
    )
    return reasons


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    plan: Plan,
    group: HeadPlan,
    sinks: Tensor | None = None,
    selection: Selection | None = None,
) -> Tensor:
    """Return the attention [B, h, Q, Dv] of one sequence's heads `group.heads`; `unsupported` is empty.

    Args:
        query: [B, h, Q, D]; key: [B, h_kv, K, D]; value: [B, h_kv, K, Dv], of one dtype.
        sinks: [h] float32, a logit per head beside the scores of each row.
        selection: blocks that the sequence reads besides the plan's pairs.
    """
    orders = orders_of(plan, group, selection is not None)
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    merging = len(orders.merged) > 1 or sinks is not None
    masks = [None] * len(orders.merged)
    if selection is not None:
        wide = query.device.type in _WIDE
        masks[0] = union_mask(selection, plan, group, query.device, gradients=gradients, wide=wide)
    results = [
        _run(query, key, value, call, order, gradients, merging, mask)
        for order, mask in zip(orders.merged, masks, strict=True)
    ]
    if results and merging:
        out = _merged([o for o, _ in results], [lse for _, lse in results if lse is not None], sinks)
    elif results:
        out = results[0][0]
    else:
        out = query.new_zeros((*query.shape[:3], value.shape[-1]))
    for order in orders.placed:
        part, lse = _run(query, key, value, call, order, gradients, sinks is not None)
        if lse is not None:
            part = _merged([part], [lse], sinks)
        assert order.queries is not None
        rows = torch.from_numpy(order.queries).to(query.device, non_blocking=True)
        out = out.index_copy(2, rows, part)
    return out


def _merged(outs: list[Tensor], lses: list[Tensor], sinks: Tensor | None) -> Tensor:
    """Return the output over all keys from those over disjoint ones, and sinks [h]: sum of o_i * exp(lse_i - lse)."""
    if sinks is not None:
        lses = [*lses, sinks[:, None].to(lses[0].dtype).expand_as(lses[0])]
    # Any common shift is right, so none of its gradient is needed.
    top = torch.stack([lse.detach() for lse in lses]).amax(0)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = [(lse - top).exp() for lse in lses]
    total = torch.stack(weights).sum(0).clamp_min(torch.finfo(torch.float32).tiny)
    out = torch.stack(
        [o * (w / total)[..., None] for o, w in zip(outs, weights[: len(outs)], strict=True)]
    ).sum(0)
    return out.to(outs[0].dtype)


@dataclass(frozen=True, eq=False)
class _Prepared:
    """What a call needs besides the tensors, on the device.

    rows, keys: padded lengths.
    gathered: indices of each key list, None for a slice.
    order: of a sorted order, the index of each row and its inverse, for queries and for keys.
    chosen: indices of chosen queries.
    """

    rows: int
    keys: int
    gathered: tuple[Tensor | None, ...]
    order: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None
    chosen: Tensor | None


@lru_cache(maxsize=32)
def _block_mask(order: Order, device: torch.device, gradients: bool) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    # Kept for later calls: tables made in inference mode could not be used in training.
    with torch.inference_mode(False), torch.no_grad():
        rows, keys = padded_length(order.rows), padded_length(order.keys)
        shape, wide = (rows // BLOCK, keys // BLOCK), device.type in _WIDE
        tables = block_tables(order, *shape, device, gradients=gradients, wide=wide)
        partial_rows, full_rows = tables.partial_rows, tables.full_rows
        return BlockMask(
            seq_lengths=(rows, keys),
            kv_num_blocks=tables.partial.count,
            kv_indices=tables.partial.index,
            full_kv_num_blocks=tables.full.count,
            full_kv_indices=tables.full.index,
            q_num_blocks=None if partial_rows is None else partial_rows.count,
            q_indices=None if partial_rows is None else partial_rows.index,
            full_q_num_blocks=None if full_rows is None else full_rows.count,
            full_q_indices=None if full_rows is None else full_rows.index,
            BLOCK_SIZE=(BLOCK, BLOCK),
            mask_mod=mask_of(order, rows, device),
        )


@lru_cache(maxsize=32)
def _prepared(order: Order, device: torch.device) -> _Prepared:
    with torch.inference_mode(False), torch.no_grad():
        gathered = tuple(_indices(indices, device) for indices in order.lists)
        places = None
        if order.stride > 1:
            behind = order.k_len - order.q_len
            places = sorting(order, behind, device), sorting(order, 0, device)
        chosen = None
        if order.queries is not None:
            chosen = torch.from_numpy(order.queries).to(device, non_blocking=True)
    return _Prepared(padded_length(order.rows), padded_length(order.keys), gathered, places, chosen)


def _indices(indices: Indices, device: torch.device) -> Tensor | None:
    if isinstance(indices, Lattice) and indices.step == 1:
        return None
    return torch.from_numpy(indices.at(np.arange(indices.count))).to(device, non_blocking=True)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    order: Order,
    gradients: bool,
    want_lse: bool,
    mask: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """Return output [B, H, n, Dv] and log-sum-exp [B, H, n] of one order, its rows in those of the queries.

    mask: the `BlockMask`, None for that of the order alone.
    """
    made = _prepared(order, query.device)
    mask = _block_mask(order, query.device, gradients) if mask is None else mask
    scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
    width = value.shape[-1]
    if made.order is not None:
        (rows, rows_back), (places, places_back) = made.order
        query = _Permuted.apply(query, rows, rows_back)
        key, value = (_Permuted.apply(x, places, places_back) for x in (key, value))
    elif made.chosen is not None:
        query = query.index_select(2, made.chosen)
    if made.order is None:
        key, value = (_axis(x, made, order) for x in (key, value))
    query, key, value = (
        _padded(query, made.rows),
        _padded(key, made.keys),
        _padded(value, made.keys),
    )
    out, lse = run_kernel(query, key, value, mask, scale, call.softcap, want_lse)
    out = out[:, :, : order.rows, :width]
    lse = None if lse is None else lse[:, :, : order.rows]
    if made.order is not None:
        rows, rows_back = made.order[0]
        out = _Permuted.apply(out, rows_back, rows)
        lse = None if lse is None else _Permuted.apply(lse, rows_back, rows)
    return out, lse


def _axis(x: Tensor, made: _Prepared, order: Order) -> Tensor:
    """Return the call's key axis: the lists one behind the other, each at its place."""
    parts: list[Tensor] = []
    end = 0
    for indices, listed, place in zip(order.lists, made.gathered, order.places, strict=True):
        if place > end:
            parts.append(x.new_zeros((*x.shape[:2], place - end, x.shape[-1])))
        assert isinstance(indices, Lattice) or listed is not None
        if listed is None:
            assert isinstance(indices, Lattice)
            parts.append(x[:, :, indices.first : indices.first + indices.count])
        else:
            parts.append(x.index_select(2, listed))
        end = place + indices.count
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _padded(x: Tensor, length: int) -> Tensor:
    """Return x with `length` tokens and at least SMALLEST_HEAD channels; added zeros change no score that counts.

    In the host's layout [B, N, H, D], so that padded and other lengths look alike to the compiler.
    """
    tokens, channels = length - x.shape[2], max(SMALLEST_HEAD - x.shape[3], 0)
    if not tokens and not channels:
        return x
    return pad(x.transpose(1, 2), (0, channels, 0, 0, 0, tokens)).transpose(1, 2)


class _Permuted(torch.autograd.Function):
    """x [B, H, n, ...] with its tokens in another order; the gradient goes back by the inverse, not by adding up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order, back)
        return x.index_select(2, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, back = ctx.saved_tensors
        return _Permuted.apply(grad, back, order), None, None
