"""Attention weights for those who ask: `output_attentions=True` on short inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor
from transformers.utils.output_capturing import _active_collector

from ..backends import Call
from ..backends.reference import reference_attention
from ..plan import Segments
from .global_projections import projecting

LONGEST_WEIGHTS = 2048  # keys up to which output_attentions=True is answered: the weights are quadratic


def weights_wanted(output_attentions: bool | None) -> bool:
    """True where the caller of the model asked for the weights; GPT-2 and OPT do not tell their layers."""
    return bool(output_attentions) or "attentions" in (_active_collector.get() or ())


def attention_weights(
    query: Tensor,
    key: Tensor,
    call: Call,
    segments: Segments,
    buffer: int,
    far: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Return the attention weights [B, H, Q, K] without dropout, 0 for key slots not yet filled."""
    k_len = key.shape[2]
    if projecting(call.pattern, call.layer, query.shape[1]) is not None:
        raise ValueError(
            "output_attentions=True asks for one weight per pair, but with global_projections=True global queries and "
            "other queries weigh different keys; leave output_attentions out"
        )
    if k_len > LONGEST_WEIGHTS:
        raise ValueError(
            f"output_attentions=True needs the {query.shape[2]} x {k_len} weights that sparse attention avoids; it is "
            f"answered up to {LONGEST_WEIGHTS} keys, use shorter inputs or attn_implementation='eager'"
        )
    one_hot = torch.eye(k_len, dtype=query.dtype, device=query.device).expand(
        key.shape[0], key.shape[1], -1, -1
    )
    weights = reference_attention(query, key, one_hot, replace(call, dropout=0.0), segments, far)
    return torch.nn.functional.pad(weights, (0, buffer - k_len))


def refuse_weights_of_parts() -> NoReturn:
    """Raise ValueError: key heads of a layer hold different lengths, so that no tensor holds all their weights."""
    raise ValueError(
        "output_attentions=True asks for weights of all heads over the same keys, but the cache holds more keys of "
        "some than of others; pass past_key_values=DynamicCache(), or use_cache=False"
    )
