"""PyTorch's FlashAttention operators for CUDA, half precision, with a window; they need no compilation.

Layout here is the operators' own, [B, N, H, D].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

LARGEST_HEAD = 256
_WIDTHS = 8  # head sizes the operators take are multiples of it


def flash_forward(
    query: Tensor, key: Tensor, value: Tensor, *, left: int, right: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return output [B, Q, H, Dv] and log-sum-exp [B, H, Q] in float32, -inf for rows that see no key.

    Args:
        query: [B, Q, H, D]; key: [B, K, H_kv, D]; value: [B, K, H_kv, Dv].
        left, right: keys to each side of the one level with the query, the last query with the last key; -1 is all.
    """
    width = value.shape[-1]
    query, key, value = _same_width(query, key, value)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        None,
        None,
        query.shape[1],
        key.shape[1],
        0.0,
        left < 0 and right == 0,
        False,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    # The kernel marks a row without keys by +inf.
    return out[..., :width], lse.masked_fill(lse == float("inf"), float("-inf"))


def flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    left: int,
    right: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return this band's share of dq, dk, dv; exact when `out` and `lse` are those of all bands merged."""
    d, width = query.shape[-1], value.shape[-1]
    query, key, value = _same_width(query, key, value)
    grad, out = (pad(x, (0, value.shape[-1] - width)) for x in (grad, out))
    # Without dropout the kernel draws nothing, so any state of its generator will do.
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad.contiguous(),
        query,
        key,
        value,
        out.contiguous(),
        lse.masked_fill(lse == float("-inf"), float("inf")).contiguous(),
        None,
        None,
        query.shape[1],
        key.shape[1],
        0.0,
        left < 0 and right == 0,
        state,
        torch.empty(0, device=query.device),
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    return dq[..., :d], dk[..., :d], dv[..., :width]


def _same_width(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad with zeros to one head size that the operators take; zeros change neither scores nor the rest of v.

    The kernels load 16 bytes at a time from rows whose channels lie side by side; what lies otherwise is copied.
    """
    width = -(-max(query.shape[-1], value.shape[-1]) // _WIDTHS) * _WIDTHS

    def fitted(x: Tensor) -> Tensor:
        if x.shape[-1] < width:
            return pad(x, (0, width - x.shape[-1]))
        steps = [x.storage_offset(), *(step for n, step in zip(x.shape, x.stride(), strict=True) if n > 1)]
        aligned = steps.pop() == 1 and not any(step % _WIDTHS for step in steps)
        return x if aligned else x.contiguous()

    return fitted(query), fitted(key), fitted(value)
