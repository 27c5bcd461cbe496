"""Attention weights for those who ask: `output_attentions=True` on short inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers.utils.output_capturing import _active_collector

from ..backends import Call, attend
from ..plan import Segments
from ..selectors import AnySelection
from .global_projections import projecting
from .ragged_layer import HeldHeads

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
    sinks: Tensor | None,
    selections: Sequence[AnySelection | None] | None = None,
) -> Tensor:
    """Return the attention weights [B, H, Q, K] without dropout, 0 for key slots not yet filled.

    With `sinks` [H] those of a row sum to less than 1.
    """
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
    call = replace(call, dropout=0.0)
    weights = attend(query, key, one_hot, call, segments, "reference", far, sinks, selections)
    return torch.nn.functional.pad(weights, (0, buffer - k_len))


def weights_of_parts(
    query: Tensor, parts: Sequence[HeldHeads], call: Call, tokens: Segments, sinks: Tensor | None
) -> Tensor:
    """Return the attention weights [B, H, Q, K] of all K `tokens` seen, 0 for those that a part no longer holds.

    Args:
        query: [B, H, Q, D], whose key heads lie in `parts`.
        tokens: one sequence per row, from its first token on.
    """
    kv_heads = sum(part.key.shape[1] for part in parts)
    groups = query.unflatten(1, (kv_heads, -1))  # [B, H_kv, G, Q, D]
    out = query.new_zeros((*groups.shape[:-1], tokens.k_len))
    for part in parts:
        own = replace(call, pattern=part.pattern)
        asked = groups[:, part.at].flatten(1, 2)
        of_heads = None if sinks is None else sinks.unflatten(0, (kv_heads, -1))[part.at].flatten()
        held = attention_weights(asked, part.key, own, part.segments, part.key.shape[2], None, of_heads)
        held = held.unflatten(1, (part.key.shape[1], -1))
        places = _places(part.segments, tokens).to(query.device)[:, None, None, None].expand(held.shape)
        out[:, part.at] = out[:, part.at].scatter_add(-1, places, held)
    return out.flatten(1, 2)


def _places(held: Segments, tokens: Segments) -> Tensor:
    """Return which of `tokens` is in each slot of `held`, int64 [B, K]; 0 for padding."""
    places = torch.zeros(held.batch, held.k_len, dtype=torch.long)
    for part in held.entries:
        for whole in tokens.entries:
            rows = slice(max(part.rows.start, whole.rows.start), min(part.rows.stop, whole.rows.stop))
            if rows.start < rows.stop:
                places[rows, part.slots] = torch.arange(tokens.k_len)[whole.slots][part.positions]
    return places
