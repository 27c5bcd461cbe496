"""One query per sequence, the decoding step: the keys it reads are views or gathered, and one call serves them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...plan.plan import Plan
from ...plan.segments import Segments
from ...plan.step import Reads
from ..call import Call
from .heads import HeadBlock, head_blocks


def is_step(call: Call, plans: list[Plan | None]) -> bool:
    """True where every sequence has one query, and nothing but the keys it reads is asked for."""
    queries = [plan for plan in plans if plan is not None]
    one_each = bool(queries) and all(plan.reads is not None for plan in queries)
    return one_each and call.softcap is None and not call.dropout


def step_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    segments: Segments,
    plans: list[Plan | None],
) -> Tensor:
    """Return the attention [B, H, 1, Dv] of one query per sequence; every plan has `reads`."""
    groups = query.shape[1] // key.shape[1]
    if segments.is_whole and plans[0] is not None and plans[0].reads is not None and len(plans[0].reads) == 1:
        (blocks,) = (head_blocks(reads.heads, groups) for reads in plans[0].reads)
        if len(blocks) == 1:
            return _attend(query, key, value, plans[0].reads[0], blocks[0], scale)
    out = query.new_zeros((query.shape[0], query.shape[1], 1, value.shape[-1]))
    for segment, plan in zip(segments.entries, plans, strict=True):
        if plan is None:
            continue
        assert plan.reads is not None
        rows, slots = segment.rows, segment.slots
        k, v = key[rows, :, slots], value[rows, :, slots]
        for reads in plan.reads:
            for block in head_blocks(reads.heads, groups):
                own = query[rows, block.query]
                out[rows, block.query] = _attend(own, k[:, block.key], v[:, block.key], reads, block, scale)
    return out


def _attend(
    query: Tensor, key: Tensor, value: Tensor, reads: Reads, block: HeadBlock, scale: float | None
) -> Tensor:
    """Return the attention of query [B, h, 1, D] of one block of heads over what they read."""
    batch, heads, _, size = query.shape
    scale = size**-0.5 if scale is None else scale
    shared = reads.listed if reads.listed is not None and len(reads.listed) == 1 else None
    own = None
    if reads.listed is not None and shared is None:
        own = reads.listed[block.first : block.first + block.count]
    if own is None:
        keys, values = (_read(x, reads.ranges, shared) for x in (key, value))
        if keys.shape[2] == 0:
            return query.new_zeros((batch, heads, 1, value.shape[-1]))
        # The query heads of a key head are rows of one product.
        rows = query.reshape(batch, key.shape[1], heads // key.shape[1], size)
        out = scaled_dot_product_attention(rows, keys, values, scale=scale)
        return out.reshape(batch, heads, 1, value.shape[-1])
    groups = heads // key.shape[1]
    listed = torch.from_numpy(own).to(key.device)
    reader = (torch.arange(heads, device=key.device) // groups)[:, None]
    keys, values = (
        torch.cat(
            (
                _read(x, reads.ranges, None).repeat_interleave(groups, 1),
                x[:, reader, listed.clamp(min=0)],
            ),
            2,
        )
        for x in (key, value)
    )
    real = torch.ones((heads, 1, keys.shape[2]), dtype=torch.bool, device=key.device)
    real[:, 0, keys.shape[2] - listed.shape[1] :] = listed >= 0
    return scaled_dot_product_attention(query, keys, values, attn_mask=real, scale=scale)


def _read(x: Tensor, ranges: tuple[range, ...], listed: np.ndarray | None) -> Tensor:
    """Return the tokens of x [B, H_kv, K, D] in these ranges and on this list [1, m]: a view of a single range."""
    parts = [x[:, :, r.start : r.stop : r.step] for r in ranges]
    if listed is not None:
        parts.append(x.index_select(2, torch.from_numpy(listed[0]).to(x.device)))
    if not parts:
        return x[:, :, :0]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
