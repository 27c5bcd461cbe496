"""The definition: dense masked softmax. Every other backend is tested against this one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..plan.segments import Segments
from .call import Call, check_far
from .selected import Selected


def allowed_pairs(call: Call, segments: Segments, heads: int, q_len: int) -> Tensor:
    """Return the mask [B, H, Q, K], True = may attend, as pattern, constraint and segments say together."""
    if call.pattern.content_based:
        raise ValueError(
            f"{call.pattern} selects by content; divide it first with hf_sparse.selectors.divided"
        )
    k_len = segments.k_len
    allowed = torch.zeros(segments.batch, heads, q_len, k_len, dtype=torch.bool)
    head = torch.arange(heads)[:, None, None]
    for segment in segments.entries:
        slots = torch.arange(k_len)[segment.slots]
        positions = torch.from_numpy(segment.positions)
        is_query = slots >= k_len - q_len
        context = call.constraint.context(
            call.pattern,
            layer=call.layer,
            heads=heads,
            length=segment.end,
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


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    segments: Segments,
    far: tuple[Tensor, Tensor] | None = None,
    sinks: Tensor | None = None,
    selected: Sequence[Selected | None] | None = None,
) -> Tensor:
    """Masked softmax over every key, in float32 (float64 stays float64).

    Args:
        query: [B, H, Q, D]; query q sits at key slot K - Q + q.
        key, value: [B, H_kv, K, D] and [B, H_kv, K, Dv]; H is a multiple of H_kv.
        far: with `call.near`, the query and key, of the same shapes, that score pairs `near` or more tokens apart.
        sinks: [H], a logit per head beside the scores of each row, whose weight goes to no value.
        selected: for each sequence the blocks of keys that were selected by their content.
    Returns:
        [B, H, Q, Dv] in ``query.dtype``. A query that may attend to nothing gets zeros.
    Raises:
        ValueError: `far` without `call.near` or the reverse, either without causality, or `call.constraint.beyond`.
    """
    check_far(query, key, call, far)
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
    scores = _products(query.to(dtype), key.to(dtype)) * scale
    if far is not None:
        assert call.near is not None
        is_near = (_distances(segments, query.shape[2]) < call.near).to(query.device)
        scores = torch.where(is_near, scores, _products(far[0].to(dtype), far[1].to(dtype)) * scale)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    allowed = allowed_pairs(call, segments, query.shape[1], query.shape[2]).to(query.device)
    extra: Tensor | None = None  # added to the scores of selected pairs
    for segment, chosen in zip(segments.entries, selected or (), strict=False):
        if chosen is not None:
            at = segment.queries(query.shape[2], segments.k_len)
            pairs, bias = chosen.mask(query.shape[1]), chosen.bias(query.shape[1])
            if bias is not None and extra is None:
                extra = torch.zeros_like(scores)
            for row in range(segment.rows.start, segment.rows.stop):
                slots = torch.arange(segments.k_len, device=query.device)[segment.slots]
                queries = torch.arange(query.shape[2], device=query.device)[at]
                own = pairs[row - segment.rows.start]
                if extra is not None and bias is not None:
                    fresh = own & ~allowed[row, :, queries[:, None], slots]
                    extra[row, :, queries[:, None], slots] = bias[row - segment.rows.start].to(dtype) * fresh
                allowed[row, :, queries[:, None], slots] |= own
    scores = scores if extra is None else scores + extra
    # Rows with no key: give softmax something finite, then zero the row, so that no NaN reaches the gradient.
    scores = scores.masked_fill(~allowed, float("-inf")).masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(dtype)[:, None, None].expand(*scores.shape[:3], 1)), -1)
    weights = scores.softmax(dim=-1)[..., : allowed.shape[-1]] * allowed
    if call.dropout:
        weights = torch.nn.functional.dropout(weights, call.dropout)
    return (weights @ _for_each_query_head(value.to(dtype), query)).to(query.dtype)


def _products(query: Tensor, key: Tensor) -> Tensor:
    """Return every query times every key, [B, H, Q, K]."""
    return query @ _for_each_query_head(key, query).mT


def _for_each_query_head(x: Tensor, query: Tensor) -> Tensor:
    return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)


def _distances(segments: Segments, q_len: int) -> Tensor:
    """Return query position - key position, [B, 1, Q, K]; of no meaning across sequences."""
    positions = torch.zeros(segments.batch, segments.k_len, dtype=torch.long)
    for segment in segments.entries:
        positions[segment.rows, segment.slots] = torch.from_numpy(segment.positions)
    return (positions[:, segments.k_len - q_len :, None] - positions[:, None])[:, None]
