"""The attention function that transformers calls in every layer of a patched model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import Call
from ..patterns.places import Places
from ..patterns.selected_heads import of_layer
from ..plan import Constraint, Segments
from .call_arguments import OWN_SINKS, POSITIONS, refuse_arguments
from .computed import AttentionCall, compute_of, keep_output
from .dense import DenseMask, dense_attention, stays_dense
from .far import far_pair
from .global_projections import replace_global_rows
from .learned_sinks import sinks_of_call
from .mask import SparseMask, running_forwards
from .ragged import attend_parts
from .rotary import Rotation
from .selecting import selections_of
from .shared_heads import holds_some, pattern_of_heads, refuse_spread_tokens
from .stored_settings import PREFIX, pattern_of_layer, settings_for
from .weights import attention_weights, weights_of_parts, weights_wanted


def sparse_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    output_attentions: bool | None = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend under the pattern of the model that `module` belongs to.

    Args:
        query: [B, H, Q, D], rotated; the queries are the last of the keys.
        key, value: [B, H_kv, K, D] and [B, H_kv, K, Dv], the cache included; of a layer whose key heads hold different
            lengths the new tokens alone.
        attention_mask: the `SparseMask` of this forward pass, or None where the model makes no mask; with a
            `DenseMask`, as in an encoder of a model that also has a decoder, attention is dense.
    Returns:
        [B, Q, H, Dv], contiguous, and the weights [B, H, Q, K] where `output_attentions` asks for them.
    Raises:
        ValueError: an argument that changes the result and that a pattern cannot honour.
    """
    refuse_spread_tokens(query)
    if stays_dense(module, attention_mask, is_causal):
        refuse_arguments(module, kwargs)
        allowed = attention_mask.allowed if isinstance(attention_mask, DenseMask) else None
        rate, wanted = dropout if module.training else 0.0, weights_wanted(output_attentions)
        return dense_attention(module, query, key, value, allowed, rate, scaling, softcap, wanted)
    if (inputs := getattr(_observer, "inputs", None)) is not None:
        inputs.append((module, query, key))
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None
    own_sinks = kwargs.pop(OWN_SINKS, None)
    refuse_arguments(module, kwargs)
    if (probe := getattr(_observer, "keywords", None)) is not None:
        probe.append({name for name, value in kwargs.items() if value is not None})
    mask = _sparse_mask(module, query, key, attention_mask, is_causal, kwargs.get("sliding_window"))
    layer = getattr(module, "layer_idx", None)
    segments, slots = _sequences(module, mask, query, key, layer, kwargs), key.shape[2]
    if segments.k_len < key.shape[2]:  # a static cache holds slots not yet filled
        key, value = key[:, :, : segments.k_len], value[:, :, : segments.k_len]
    pattern = of_layer(pattern_of_layer(mask.settings, layer, type(module).__name__), layer or 0)
    call = Call(
        pattern=pattern_of_heads(pattern, module, query, layer or 0, mask.constraint.causal),
        constraint=mask.constraint,
        scale=scaling,
        softcap=softcap,
        dropout=dropout if module.training else 0.0,
        layer=layer or 0,
    )
    places, rotation = _placed(mask, call, trial=probe is not None)
    far = None
    if places is not None and rotation is not None:
        call = replace(call, near=places.near)
        held = None if mask.far_keys is None else mask.far_keys(call.layer)
        far = far_pair(rotation, places, query, key, segments, mask.base, mask.memo, held)
    parts = None if mask.held_heads is None else mask.held_heads(call.layer, key, value)
    compute, is_dense = compute_of(module)
    trial = probe is not None
    sinks = sinks_of_call(module, query, mask.settings, layer, own_sinks, is_dense=is_dense, trial=trial)
    if parts is None:
        backend = mask.settings.backend
        selections = selections_of(module, mask, call, query, key, segments, trial)
        asked = AttentionCall(module, query, key, value, call, segments, backend, far, sinks, selections)
        out = asked.attend() if compute is None else compute(asked)
    elif compute is None:
        out = attend_parts(query, parts, call, mask.settings.backend, sinks)
    else:
        raise ValueError(
            "attention is computed by something else here, which needs the keys of all heads, but the cache holds more "
            "of some heads than of others; pass use_cache=False"
        )
    out = out.transpose(1, 2).contiguous()
    if not is_dense:
        out = replace_global_rows(module, query, key, value, out, call, segments, trial)
    keep_output(module, out.transpose(1, 2))
    if not weights_wanted(output_attentions):
        return out, None
    if parts is not None:
        return out, weights_of_parts(query, parts, call, mask.segments, sinks)
    return out, attention_weights(query, key, call, segments, slots, far, sinks, selections)


def _sequences(
    module: nn.Module, mask: SparseMask, query: Tensor, key: Tensor, layer: int | None, kwargs: dict[str, Any]
) -> Segments:
    """Return the sequences in the slots of `key`."""
    positions = kwargs.get("position_ids") if kwargs.get(POSITIONS) is None else kwargs[POSITIONS]
    segments = mask.sequences(positions, kwargs.get("cu_seq_lens_q"))
    held = mask.held(layer)
    slots = mask.shape[-1] if held is None else held.k_len
    if mask.q_len != query.shape[2] or slots != key.shape[2]:
        raise ValueError(
            f"{type(module).__name__} attends from {query.shape[2]} queries to {key.shape[2]} keys but its mask was "
            f"made for {mask.q_len} and {slots}; this cache or adapter cannot run under a sparse pattern"
        )
    if held is None:
        return segments
    if mask.is_packed(positions, kwargs.get("cu_seq_lens_q")):
        raise ValueError(
            "position_ids restart, so the rows hold packed samples, which no later token can continue; pass "
            "use_cache=False, or give each sample its own row"
        )
    return held


def _placed(mask: SparseMask, call: Call, trial: bool) -> tuple[Places | None, Rotation | None]:
    """Return at which places the far keys of a call are seen and what turns them there; nothing where none are."""
    places = call.pattern.places(call.layer)
    if places is None or trial:  # the model is prepared for places after its trial
        return None, None
    if mask.positions is None:
        raise ValueError(
            f"{call.pattern} sees far keys at other places, for which hf_sparse.patch_model or hf_sparse.load prepares "
            f"a model whose weights are in memory; patch it, before weights are offloaded "
            f"(attn_implementation={PREFIX + mask.settings.pattern.name!r} alone does not prepare it)"
        )
    return places, mask.positions.rotations.get(call.layer)


def _sparse_mask(
    module: torch.nn.Module, query: Tensor, key: Tensor, mask: Any, is_causal: bool | None, window: int | None
) -> SparseMask:
    if isinstance(mask, SparseMask):
        return mask
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    # The id of the running backward pass; -1 outside of one. Towers that never have a mask are not causal, and sequence
    # parallelism takes it away.
    taken = mask is None and (not causal or holds_some(module, query))
    if torch._C._current_graph_task_id() != -1 and not taken:
        raise ValueError(
            "gradient checkpointing recomputes this layer under another attention than its forward pass ran; call "
            "backward() before patching, unpatching or leaving patched()"
        )
    if mask is not None:
        what = f"a 4-D {mask.dtype} tensor" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"attention_mask reached {type(module).__name__} as {what}, which says pair by pair what a sparse "
            f"pattern says by rule; pass a 2-D padding mask [batch, tokens], or position_ids that "
            f"restart for packed samples"
        )
    config: Any = module.config
    if any(f.flags is not None and f.config is config for f in running_forwards()):
        raise ValueError(
            f"{type(module).__name__} attends without a mask, so global tokens of a call cannot reach it; make tokens "
            f"global by their positions, as an option of the pattern"
        )
    q_len, k_len = query.shape[2], key.shape[2]
    mask = SparseMask(
        settings_for(config),
        Constraint(causal=bool(causal), window=window),
        Segments.whole(query.shape[0], k_len),
        q_len,
        k_len,
        query.device,
        may_be_packed=q_len == k_len,
    )
    running = [forward for forward in running_forwards() if forward.config is config]
    return mask.of(running[-1]) if running else mask


_observer = threading.local()


@contextmanager
def observed_keywords() -> Iterator[list[set[str]]]:
    """Collect the names of the keyword arguments of every attention call this thread makes inside the block."""
    seen: list[set[str]] = []
    _observer.keywords = seen
    try:
        yield seen
    finally:
        del _observer.keywords


@contextmanager
def observed_inputs() -> Iterator[list[tuple[torch.nn.Module, Tensor, Tensor]]]:
    """Collect (module, query, key) of every attention call this thread makes inside the block; calls return zeros."""
    seen: list[tuple[torch.nn.Module, Tensor, Tensor]] = []
    _observer.inputs = seen
    try:
        yield seen
    finally:
        del _observer.inputs
