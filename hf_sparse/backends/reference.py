"""The definition: dense masked softmax. Every other backend is tested against this one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan.segments import Segments
from .call import Call


def allowed_pairs(call: Call, segments: Segments, heads: int, q_len: int) -> Tensor:
    """Return the mask [B, H, Q, K], True = may attend, as pattern, constraint and segments say together."""
    k_len = segments.k_len
    allowed = torch.zeros(segments.batch, heads, q_len, k_len, dtype=torch.bool)
    head = torch.arange(heads)[:, None, None]
    for segment in segments.entries:
        slots = torch.arange(k_len)[segment.slots]
        positions = segment.first + torch.arange(len(slots))
        is_query = slots >= k_len - q_len
        context = call.constraint.context(
            call.pattern,
            layer=call.layer,
            heads=heads,
            length=segment.first + len(slots),
            chosen=segment.chosen,
        )
        pairs = call.constraint.allowed(
            call.pattern, context, head, positions[is_query][None, :, None], positions[None, None, :]
        )
        queries = slots[is_query] - (k_len - q_len)
        rows = torch.arange(segments.batch)[segment.rows]
        allowed[rows[:, None, None], :, queries[:, None], slots] = pairs.expand(
            len(rows), heads, len(queries), len(slots)
        ).permute(0, 2, 3, 1)
    return allowed


def reference_attention(query: Tensor, key: Tensor, value: Tensor, call: Call, segments: Segments) -> Tensor:
    """Masked softmax over every key, in float32 (float64 stays float64).

    Args:
        query: [B, H, Q, D]; query q sits at key slot K - Q + q.
        key, value: [B, H_kv, K, D] and [B, H_kv, K, Dv]; H is a multiple of H_kv.
    Returns:
        [B, H, Q, Dv] in ``query.dtype``. A query that may attend to nothing gets zeros.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1).to(dtype) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
    scores = query.to(dtype) @ k.mT * scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    allowed = allowed_pairs(call, segments, query.shape[1], query.shape[2]).to(query.device)
    # Rows with no key: give softmax something finite, then zero the row, so that no NaN reaches the gradient.
    weights = scores.masked_fill(~allowed, float("-inf"))
    weights = weights.masked_fill(~allowed.any(-1, keepdim=True), 0.0).softmax(dim=-1) * allowed
    if call.dropout:
        weights = torch.nn.functional.dropout(weights, call.dropout)
    return (weights @ v).to(query.dtype)
