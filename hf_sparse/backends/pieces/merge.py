"""Partial results over disjoint keys joined by their log-sum-exp, exactly: o = sum of o_i * exp(lse_i - lse)."""

from __future__ import annotations

import torch
from torch import Tensor


def emit(out: Tensor, lse: Tensor, o: Tensor, part: Tensor | None, merge: bool) -> None:
    """Write a chunk's result, or merge it into what other pieces gave."""
    if merge:
        assert part is not None
        o, part = merged(out, lse, o, part)
    out.copy_(o)
    if part is not None:
        lse.copy_(part)


def merged(out: Tensor, lse: Tensor, o: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp over both sets of keys; either may be empty (-inf)."""
    top = torch.maximum(lse, part)
    top = top.masked_fill(top == float("-inf"), 0.0)
    a, b = (lse - top).exp(), (part - top).exp()
    total = a + b
    share = (b / total.clamp_min(torch.finfo(total.dtype).tiny))[..., None]
    return torch.lerp(out.to(share.dtype), o.to(share.dtype), share), total.log_().add_(top)


def join_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Merge in place with one more key per row, scored `sinks` [H] and of value 0: out [B, H, Q, Dv], lse [B, H, Q]."""
    joined = torch.logaddexp(lse, sinks[:, None].to(lse.dtype))
    out *= share_of(lse, joined)[..., None].to(out.dtype)
    lse.copy_(joined)


def share_of(part: Tensor, lse: Tensor) -> Tensor:
    """Return exp(part - lse), the share of a row's weights that keys of log-sum-exp `part` have; 0 of nothing."""
    return (part - lse.masked_fill(lse == float("-inf"), 0.0)).exp()


def put(target: Tensor, share: Tensor, writes: bool) -> None:
    """Write a share of a gradient, or add it to what other pieces gave."""
    if writes:
        target.copy_(share)
    else:
        target.add_(share)
