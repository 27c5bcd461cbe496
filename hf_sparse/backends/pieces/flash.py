"""PyTorch's fused CPU attention operator, which returns the log-sum-exp that pieces are merged with.

Used for spans without a mask: all keys, or a causal triangle aligned at the top left.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flash_forward(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return output [B, H, Q, Dv] and log-sum-exp [B, H, Q] (float32 for half types).

    Args:
        query: [B, H, Q, D]; key: [B, H_kv, S, D]; value: [B, H_kv, S, Dv], S >= 1 (no key kills the process).
        causal: row t sees keys 0 .. t.
    """
    d_value = value.shape[-1]
    query, key, value = _same_width(query, key, value)
    out, lse = _forward(query, key, value, 0.0, causal, scale=scale)
    return out[..., :d_value], lse


def flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return this span's share of dq, dk, dv; exact when `out` and `lse` are those of all spans merged."""
    d, d_value = query.shape[-1], value.shape[-1]
    query, key, value = _same_width(query, key, value)
    grad, out = (_readable(x, value.shape[-1]) for x in (grad, out))
    dq, dk, dv = _backward(grad, query, key, value, out, lse, 0.0, causal, scale=scale)
    return dq[..., :d], dk[..., :d], dv[..., :d_value]


def _same_width(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad with zeros to one head size: the operator takes no other; zeros change neither scores nor the rest of v."""
    width = max(query.shape[-1], value.shape[-1])
    return _readable(query, width), _readable(key, width), _readable(value, width)


def _readable(x: Tensor, width: int) -> Tensor:
    """Return x [..., D] with `width` numbers side by side: the operator takes that for granted, and reads others."""
    if x.shape[-1] < width:
        x = pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()
