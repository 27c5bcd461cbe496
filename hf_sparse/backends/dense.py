"""Calls about which nothing is sparse: PyTorch's own dense operator computes them."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..plan.plan import Plan
from ..plan.segments import Segments
from .call import Call


def is_dense(call: Call, segments: Segments, plans: list[Plan | None], q_len: int, device: str) -> bool:
    """True when the plan holds every pair of plain attention, and PyTorch has an operator for it."""
    plan = plans[0] if segments.is_whole else None
    if plan is None or call.softcap is not None or (call.dropout and device == "cpu"):
        return False
    k_len = segments.k_len
    if not call.constraint.causal or q_len == 1:
        return plan.pairs == q_len * k_len
    return q_len == k_len and plan.pairs == q_len * (q_len + 1) // 2


def dense_attention(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    """The same attention by PyTorch's own dense operator, where nothing is sparse about the call."""
    return scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=call.dropout,
        is_causal=call.constraint.causal and query.shape[2] > 1,
        scale=call.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
