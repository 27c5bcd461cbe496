"""Masks of spans as additive biases, made once for all layers and steps."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .runs import Mask, Run, Span


def span_bias(span: Span, run: Run, part: slice, groups: int, query: Tensor) -> Tensor | None:
    """Return a span's bias for chunks `part` of a run, [M, S] or [T, M, S]; None without a mask.

    M = rows of all `groups` query heads of a key head.
    """
    if span.mask is None:
        return None
    if not span.mask.differs:
        return _bias(span.mask, span.width, groups, query.dtype, query.device)
    allowed = span.mask.allowed(span.width, query.device, part)
    return as_bias(allowed, query.dtype).repeat(1, groups, 1)


def empty_rows(run: Run, part: slice, groups: int, device: torch.device) -> Tensor | None:
    """Return the rows without any key in chunks `part` of a run, [T, M] bool; None where there are none."""
    if run.empty is None or not run.empty[part].any():
        return None
    return torch.from_numpy(run.empty[part]).to(device).repeat(1, groups)


@lru_cache(maxsize=64)  # a few masks serve all layers and steps; each is some 100 KiB
def _bias(mask: Mask, width: int, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return as_bias(mask.allowed(width, device), dtype).repeat(groups, 1)


def as_bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where allowed and -inf elsewhere, in the dtype in which inputs of `dtype` are computed."""
    exact = torch.promote_types(dtype, torch.float32)
    return torch.zeros(allowed.shape, dtype=exact, device=allowed.device).masked_fill_(
        ~allowed, float("-inf")
    )
