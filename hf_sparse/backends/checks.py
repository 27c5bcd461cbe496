"""What a call and its tensors must be, and the one dtype they are computed in."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from ..plan.segments import Segments
from .call import Call, check_far


def check_tensors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    segments: Segments,
    far: tuple[Tensor, Tensor] | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Raise ValueError unless a call fits its tensors; arguments as in `attend`."""
    check_far(query, key, call, far)
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise ValueError("attention takes query [B, H, Q, D], key [B, H_kv, K, D] and value [B, H_kv, K, Dv]")
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"shapes do not fit: query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    if not query.dtype.is_floating_point or not (
        key.dtype.is_floating_point and value.dtype.is_floating_point
    ):
        raise ValueError(
            f"attention takes floating-point tensors, got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    if 0 in (query.shape[1], key.shape[1], query.shape[3], value.shape[3]):
        raise ValueError(
            f"attention needs at least one head of at least one channel, got query {tuple(query.shape)}, key "
            f"{tuple(key.shape)} and value {tuple(value.shape)}"
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads are no multiple of {key.shape[1]} key heads")
    if query.shape[2] > key.shape[2]:
        raise ValueError(
            f"{query.shape[2]} queries for {key.shape[2]} keys: queries are the last of the keys"
        )
    if (segments.batch, segments.k_len) != (key.shape[0], key.shape[2]):
        raise ValueError(
            f"segments describe {segments.batch} x {segments.k_len} slots, the keys are {key.shape[0]} x {key.shape[2]}"
        )
    if sinks is not None and (tuple(sinks.shape) != query.shape[1:2] or not sinks.dtype.is_floating_point):
        raise ValueError(
            f"sinks must be one floating-point logit for each of {query.shape[1]} query heads, got "
            f"{tuple(sinks.shape)} {sinks.dtype}"
        )
    if not 0.0 <= call.dropout < 1.0:
        raise ValueError(f"dropout must be at least 0 and below 1, got {call.dropout}")
    if call.softcap is not None and not call.softcap > 0:
        raise ValueError(f"softcap must be above 0, or None for no cap, got {call.softcap}")


def one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return all in one dtype: autocast's where it is on (rotary embeddings leave q and k in float32 there)."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device) and tensors[0].dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = reduce(torch.promote_types, (x.dtype for x in tensors))
    return tuple(x.to(dtype) for x in tensors)
