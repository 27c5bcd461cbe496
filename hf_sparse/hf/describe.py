"""What a model runs, in words and figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..backends import Call
from ..backends.pieces import operator
from ..patterns import Pattern, Union
from ..plan import Constraint
from ..plan.cost import cost
from .patch import is_switched, settings, unwrap
from .routing import attention_layers
from .stored_settings import SparseSettings, settings_from_json


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
    current = settings(base)
    assert current is not None
    routed = attention_layers(config)
    active = [i for i in routed if current.layers is None or i in current.layers]
    lines = [
        f"{name}: sparse attention",
        f"pattern   {current.pattern}",
        f"layers    {len(active)} of {len(routed)} sparse" + _names(active, routed),
        f"backend   {_backend(base, current, config)}",
    ]
    lines += _native(current.pattern, config)
    lines += _cost(base, config, current, active, routed, seq_len)
    return "\n".join(lines)


def _names(active: list[int], routed: tuple[int, ...]) -> str:
    return "" if len(active) == len(routed) else f" ({', '.join(map(str, active))}); the others dense"


def _backend(base: nn.Module, current: SparseSettings, config: Any) -> str:
    if current.backend == "reference":
        return "reference: dense masked softmax, quadratic"
    softcap, rate = getattr(config, "attn_logit_softcapping", None), _dropout(config)
    call = Call(current.pattern, softcap=softcap)
    device = next(base.parameters()).device
    usual, training = operator(call, device), operator(replace(call, dropout=rate), device)
    line = f"{current.backend}: torch, operator {usual}"
    if softcap is not None:
        line += f" (scores are soft-capped at {softcap})"
    if rate:
        line += f"; {training} in training (attention dropout is {rate})"
    if current.backend == "auto":
        line += "; dense where the pattern covers everything"
    return line


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
            m
            for m in (pattern.members if isinstance(pattern, Union) else (pattern,))
            if _reaches_beyond(m, window)
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


def native_window(config: Any) -> int | None:
    """Return the model's own sliding window in keys, the query itself included; None where it has none."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if (
        window is None
        or (kinds and "sliding_attention" not in kinds)
        or getattr(config, "use_sliding_window", True) is False
    ):
        return None
    return int(window) + 1 if config.model_type == "modernbert" else int(window)


def _reaches_beyond(pattern: Pattern, window: int) -> bool:
    """True where some query may see a key at a distance of at least `window`."""
    far = 4 * window
    return bool(pattern.mask(1, far + 1)[..., : far - window + 1].any())


def _cost(
    base: nn.Module,
    config: Any,
    current: SparseSettings,
    active: list[int],
    routed: tuple[int, ...],
    seq_len: int | None,
) -> list[str]:
    n = seq_len or min(8192, getattr(config, "max_position_embeddings", None) or 8192)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    causal = is_causal(base)
    costs = [
        cost(
            current.pattern_at(layer),
            n,
            constraint=layer_constraint(config, layer, causal),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype_bytes=next(base.parameters()).element_size(),
            layer=layer,
        )
        for layer in routed
    ]
    sparse = [costs[routed.index(layer)] for layer in active]
    density = sum(c.pairs for c in sparse) / sum(c.dense_pairs for c in sparse)
    whole = sum(c.pairs for c in costs) / sum(c.dense_pairs for c in costs)
    line = f"cost      at {n:,} tokens: density {density:.3f} in the sparse layers, {whole:.3f} in all; "
    line += f"{sum(c.flops for c in costs) / 1e9:.3g} GFLOP of attention per forward"
    if causal:
        line += f", {sum(c.kv_bytes_per_step for c in costs) / 2**20:.3g} MiB of keys and values read per decoded token"
    return [line]


def is_causal(model: nn.Module) -> bool:
    """Return whether the model's attention modules are causal; encoders are not."""
    if getattr(model.config, "is_causal", None) is False:
        return False
    flags = [m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    return any(flags) if flags else True


def layer_constraint(config: Any, layer: int, causal: bool) -> Constraint:
    """Return what the model itself imposes on a layer."""
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds else "sliding_attention"
    chunk = getattr(config, "attention_chunk_size", None) if kind == "chunked_attention" else None
    return Constraint(causal, native_window(config) if kind == "sliding_attention" else None, chunk)
