"""What a model runs, in words and figures."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..backends import Call, Choice, Inputs, preview
from ..patterns import Pattern
from ..patterns.base import short
from ..plan import Constraint, Cost, cost
from .active import is_switched, settings, unwrap
from .held_mass import held_settings
from .kept_mass import reports
from .kv_bytes import kv_bytes
from .learned_sinks import sinks
from .native import head_size, key_heads, layer_constraint, native_window
from .routing import attention_layers, has_encoder, is_causal
from .stored_settings import SparseSettings, layer_count, query_heads, settings_from_json


def describe(model: nn.Module, seq_len: int | None = None) -> str:
    """Return what attention `model` runs: pattern, layers, backend, the model's own limits, and what it costs.

    Args:
        seq_len: tokens for which the cost is given; default the smaller of 8,192 and what the model was trained for.
    """
    base = unwrap(model)
    config = base.config.get_text_config()
    name = type(base).__name__
    saved = getattr(config, "sparse_attention", None)
    if not is_switched(base):
        lines = [f"{name}: dense attention ({config._attn_implementation!r})"]
        if saved is not None:
            lines.append(
                f"note      {settings_from_json(saved).pattern} is stored in its config but not active: another "
                f"attention implementation is set; call hf_sparse.patch_model, or load it with hf_sparse.load"
            )
        return "\n".join(lines)
    current = held_settings(base) or settings(base)
    assert current is not None
    routed, length = attention_layers(config), _length(config, seq_len)
    costs = {layer: _layer_cost(base, config, current, layer, length) for layer in routed}
    sparse = [layer for layer in routed if leaves_out(current.pattern_at(layer), layer, length, base)]
    lines = [
        f"{name}: sparse attention",
        f"pattern   {current.pattern}",
        f"layers    {len(sparse)} of {len(routed)} sparse" + _names(sparse, routed),
        f"backend   {_backend(base, current, config, sparse or list(routed), length)}",
    ]
    if has_encoder(base):
        lines.append(
            "encoder   dense, and so is attention across to it; the figures are of the decoder's self-attention"
        )
    lines += _native(current.pattern, config)
    lines += _sinks(base, current)
    lines += _globals(current.pattern)
    lines.append(_cost(list(costs.values()), [costs[layer] for layer in sparse], length, is_causal(base)))
    if is_causal(base):
        size = next(base.parameters()).element_size()
        held = kv_bytes(current, config, length, dtype_bytes=size, room=False)
        lines.append(f"cache     holds {held / 2**20:.3g} MiB of keys and values after {length:,} tokens")
    lines += reports(base)
    return "\n".join(lines)


def _length(config: Any, seq_len: int | None) -> int:
    names = ("max_position_embeddings", "max_target_positions")
    return seq_len or min(8192, next((n for name in names if (n := getattr(config, name, None))), 8192))


def _names(sparse: list[int], routed: tuple[int, ...]) -> str:
    """Return which layers are sparse; a layer whose pattern leaves nothing out is dense."""
    if not sparse:
        return "; at this length the pattern leaves nothing out"
    return "" if len(sparse) == len(routed) else f" ({', '.join(map(str, sparse))}); the others dense"


def leaves_out(pattern: Pattern, layer: int, n: int, base: PreTrainedModel) -> bool:
    """True where a layer's pattern, apart from the model's own limits, leaves out some of the pairs of `n` tokens."""
    heads = query_heads(base.config.get_text_config())
    alone = cost(pattern, n, constraint=Constraint(is_causal(base)), heads=heads, layer=layer)
    return alone.pairs < alone.dense_pairs


def _globals(pattern: Pattern) -> list[str]:
    if not pattern.takes_globals:
        return []
    ids = (
        f", and the tokens {short(pattern.global_token_ids)} of the input" if pattern.global_token_ids else ""
    )
    return [f"globals   besides, those of each call's global_attention_mask{ids}; not counted below"]


def _backend(
    base: PreTrainedModel, current: SparseSettings, config: Any, sparse: list[int], length: int
) -> str:
    """Return what computes the first sparse layer, without gradients and, where that differs, in training."""
    if current.backend == "reference":
        return "reference: dense masked softmax, quadratic"
    parameter = next(base.parameters())
    asked = (base, current, sparse[0], length, parameter.device, parameter.dtype)
    usual = preview_layer(*asked, training=False)
    softcap, rate = getattr(config, "attn_logit_softcapping", None), _dropout(config)
    try:
        training = preview_layer(*asked, training=True)
        also = f"{training.backend}, operator {training.operator}" if training != usual else ""
    except ValueError as reason:  # an explicit backend that only computes forward
        also = f"refused ({reason})"
    line = f"{current.backend}: {usual.backend}, operator {usual.operator}"
    if softcap is not None:
        line += f" (scores are soft-capped at {softcap})"
    if also:
        line += f"; in training {also}" + (f" (attention dropout is {rate})" if rate else "")
    if current.backend == "auto" and not _sinks(base, current):
        line += "; dense where the pattern covers everything"
    return line


def preview_layer(
    base: PreTrainedModel,
    current: SparseSettings,
    layer: int,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    training: bool,
) -> Choice:
    """Return what would compute a layer of a patched model on `length` tokens, there and in that type.

    Raises:
        ValueError: the backend asked for cannot, in training for want of a backward pass or of dropout.
    """
    config = base.config.get_text_config()
    heads = query_heads(config) or 1
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    call = Call(
        current.pattern_at(layer),
        Constraint(is_causal(base)),
        softcap=getattr(config, "attn_logit_softcapping", None),
        dropout=_dropout(config) if training else 0.0,
        layer=layer,
    )
    inputs = Inputs(device, dtype, size, training, sinks=bool(_sinks(base, current)))
    return preview(call, inputs, heads=heads, length=length, backend=current.backend)


def _sinks(base: PreTrainedModel, current: SparseSettings) -> list[str]:
    if current.learned_sinks:
        return [
            f"sinks     learned: a logit per query head joins the softmax in {len(sinks(base))} layers, without a value"
        ]
    if any(name.endswith(".sinks") for name, _ in base.named_parameters()):  # as transformers calls them
        return ["sinks     the model's own, a logit per query head, also join the softmax under the pattern"]
    return []


def _dropout(config: Any) -> float:
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    return float(next((rate for n in names if (rate := getattr(config, n, None))), 0.0))


def _native(pattern: Pattern, config: Any) -> list[str]:
    window, chunk = native_window(config), getattr(config, "attention_chunk_size", None)
    kinds = getattr(config, "layer_types", None) or []
    lines = []
    if window is not None:
        where = f"{kinds.count('sliding_attention')} of {len(kinds)} layers" if kinds else "every layer"
        far = [
            leaf for leaf in _leaves(pattern) if not leaf.by_content and _reaches_beyond(leaf, window, config)
        ]
        lost = (
            f"; there it removes what {' and '.join(map(str, far))} allows farther away (sinks, globals, strides)"
            if far
            else ""
        )
        lines.append(f"native    the model's own window of {window} keys also applies in {where}{lost}")
    if chunk is not None and "chunked_attention" in kinds:
        lines.append(
            f"native    the model's own chunks of {chunk} tokens also apply: nothing is seen across them"
        )
    return lines


def _leaves(pattern: Pattern) -> list[Pattern]:
    """Return the patterns that `pattern` is made of, each once."""
    return list(dict.fromkeys(leaf for m in pattern.members for leaf in _leaves(m))) or [pattern]


def _reaches_beyond(pattern: Pattern, window: int, config: Any) -> bool:
    """True where some query of some head and layer may see a key at a distance of at least `window`."""
    far = 4 * window
    layers = range(layer_count(config)) if pattern.per_layer else (0,)
    masks = (pattern.mask(1, far + 1, heads=query_heads(config), layer=layer) for layer in layers)
    return any(bool(mask[..., : far - window + 1].any()) for mask in masks)


def _layer_cost(base: PreTrainedModel, config: Any, current: SparseSettings, layer: int, n: int) -> Cost:
    heads = query_heads(config)
    return cost(
        current.pattern_at(layer),
        n,
        constraint=layer_constraint(config, layer, is_causal(base)),
        heads=heads,
        kv_heads=key_heads(config, layer),
        head_dim=head_size(config, layer),
        dtype_bytes=next(base.parameters()).element_size(),
        layer=layer,
    )


def _cost(costs: list[Cost], sparse: list[Cost], n: int, causal: bool) -> str:
    line = f"cost      at {n:,} tokens: "
    if sparse:
        line += f"density {_density(sparse)} in the sparse layers, {_density(costs)} in all; "
    else:
        line += "density 1.000, as dense attention; "
    line += f"{sum(c.flops for c in costs) / 1e9:.3g} GFLOP of attention per forward"
    if causal:
        line += f", {sum(c.kv_bytes_per_step for c in costs) / 2**20:.3g} MiB of keys and values read per decoded token"
    return line


def _density(costs: list[Cost]) -> str:
    density = sum(c.pairs for c in costs) / sum(c.dense_pairs for c in costs)
    return f"{density:.3f}" if density >= 0.01 else f"{density:.2g}"
