"""Attention over key heads of which a cache holds different lengths: part by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..backends import Call, attend
from .ragged_layer import HeldHeads


def attend_parts(
    query: Tensor, parts: Sequence[HeldHeads], call: Call, backend: str, sinks: Tensor | None = None
) -> Tensor:
    """Return the attention [B, H, Q, Dv] of `query` [B, H, Q, D], whose key heads lie in `parts`.

    Arguments and result as of `attend`; no key is copied.
    """
    kv_heads = sum(part.key.shape[1] for part in parts)
    groups = query.unflatten(1, (kv_heads, -1))  # [B, H_kv, G, Q, D]
    out: Tensor | None = None
    for part in parts:
        own = replace(call, pattern=part.pattern)
        held = None if sinks is None else sinks.unflatten(0, (kv_heads, -1))[part.at].flatten()
        asked = groups[:, part.at].flatten(1, 2)
        made = attend(asked, part.key, part.value, own, part.segments, backend, sinks=held)
        made = made.transpose(1, 2).unflatten(2, (part.key.shape[1], -1))  # [B, Q, h, G, Dv]
        if out is None:
            out = made.new_empty((*made.shape[:2], kv_heads, *made.shape[3:]))
        out[:, :, part.at] = made
    assert out is not None
    return out.flatten(2, 3).transpose(1, 2)
