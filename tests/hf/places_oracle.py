"""Dense logits of a tiny model in which every pair is scored at the distance that a pattern says."""

from __future__ import annotations

import torch
from tiny_models import native_constraint, tiny
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

import hf_sparse
from hf_sparse import Pattern
from hf_sparse.hf.positions import find_rotations
from hf_sparse.hf.rotary import Rotation

_NAME = "places_oracle"


def dense_with_places(
    name: str, pattern: Pattern, ids: Tensor, model: torch.nn.Module | None = None
) -> Tensor:
    """Return the logits [B, N, V] of the tiny model `name` under `pattern`, pair by pair.

    model: an unpatched copy of it to run, where it is not as `tiny` makes it; it is left with another attention.
    """
    model = tiny(name) if model is None else model
    with hf_sparse.patched(model, "full", backend="reference"):
        rotations = find_rotations(model)
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers

    def attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
        layer = module.layer_idx
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        scores = _scores(query, key, rotations[layer], pattern, layer)
        scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        n, heads = query.shape[2], query.shape[1]
        position = torch.arange(n)
        allowed = pattern.mask(n, heads=heads, layer=layer)
        if (window := native_constraint(name, kinds[layer]).window) is not None:
            allowed = allowed & (position[:, None] - position < window)
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
    model.set_attn_implementation(_NAME)
    with torch.no_grad():
        return model(input_ids=ids).logits


def _scores(query: Tensor, key: Tensor, rotation: Rotation | None, pattern: Pattern, layer: int) -> Tensor:
    """Return the scores [B, H, N, N]: query q, as at the pair's distance, times key k, as at position 0."""
    places = pattern.places(layer)
    if rotation is None or places is None:
        return query @ key.transpose(-1, -2)
    n = torch.arange(query.shape[2])
    key = rotation.turn(key, rotation.angles(-n[None], key))
    query = rotation.turn(query, rotation.angles(-n[None], query))
    columns = []
    for k in n:
        angles = rotation.angles(places.distance(n, k)[None], query)
        columns.append((rotation.turn(query, angles) * key[:, :, k, None]).sum(-1))
    return torch.stack(columns, dim=-1)
