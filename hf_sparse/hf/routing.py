"""Whether a model's attention goes through transformers' AttentionInterface, found out before anything is promised."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..backends import recording
from .attention import POSITIONS, observed_keywords
from .hooks import add_hook, argument, mask_owner, remove_hooks

# Routed, but not honestly: found by comparing each with its own eager attention.
_REFUSED_TYPES = {
    "bigbird_pegasus": "its encoder adds the mask outside the attention interface",
    "deepseek_v4": "it extends the mask over compressed keys and needs a mask tensor for that",
    "doge": "it builds its own mask per head and needs a mask tensor for that",
    "layoutlm": "it builds its own 4-D mask",
}
_ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention", "attention", "hybrid"}


def text_config_key(model: PreTrainedModel) -> str | None:
    """Return the name of the text model's config within a composite, None where the model is a text model itself."""
    config = model.config
    text = config.get_text_config()
    if text is config:
        return None
    for key in config.sub_configs:
        if getattr(config, key, None) is text:
            return key
    raise ValueError(f"{type(model).__name__} cannot be patched: its text model has no config of its own")


def refuse_unroutable(model: Any) -> None:
    """Raise ValueError, naming class and reason, where the source already shows that a pattern cannot take."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"patch_model needs a transformers model, got {name}; patch it before compiling or wrapping it"
        )
    config = model.config
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise ValueError(
            f"{name} cannot be patched: it has cross-attention, which sparse patterns do not cover; patch decoder-only "
            f"or encoder-only models"
        )
    for kind in (config.model_type, config.get_text_config().model_type):
        if kind in _REFUSED_TYPES:
            raise ValueError(f"{name} cannot be patched: {_REFUSED_TYPES[kind]}; use another architecture")
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"{name} cannot be patched: its attention does not go through transformers' AttentionInterface; use "
            f"another architecture, e.g. Llama, Qwen, Mistral, GPT-2 or BERT"
        )


def attention_layers(config: Any) -> tuple[int, ...]:
    """Return the indices of the layers that have softmax attention; hybrids have others too."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if not kinds:
        return tuple(range(config.num_hidden_layers))
    return tuple(i for i, kind in enumerate(kinds) if kind in _ATTENTION_KINDS)


def is_causal(model: nn.Module) -> bool:
    """Return whether the model's attention modules are causal; encoders are not."""
    if getattr(model.config, "is_causal", None) is False:
        return False
    flags = [m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    return any(flags) if flags else True


def verify_routing(model: PreTrainedModel, layers: tuple[int, ...] | None, **extra: Any) -> set[str]:
    """Run 4 tokens through the switched model and return the keyword arguments every attention call received.

    `extra` goes to the model besides the tokens. Leaves weights, buffers, training flags and random state as they were.

    Raises:
        ValueError: the forward fails, or an attention layer did not call the pattern.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    try:
        with _untouched(model), recording() as recorder, observed_keywords() as keywords:
            model(**_probe_inputs(model), **extra)
    except Exception as error:  # whatever a foreign architecture's code raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{name} cannot be patched: a trial forward of 4 tokens failed with {reason}"
        ) from error
    expected = attention_layers(config)
    if not recorder.calls:
        raise ValueError(
            f"{name} cannot be patched: its layers never called the attention interface, so it would stay dense; use "
            f"another architecture"
        )
    if len(recorder.calls) < len(expected):
        raise ValueError(
            f"{name} cannot be patched: only {len(recorder.calls)} of its {len(expected)} attention layers go through "
            f"the attention interface"
        )
    if layers is not None and (missing := set(layers) - {call.layer for call in recorder.calls}):
        raise ValueError(
            f"layers {sorted(missing)} of {name} made no attention call of their own; choose among "
            f"{sorted({call.layer for call in recorder.calls})}"
        )
    return set.intersection(*keywords)


def _probe_inputs(model: PreTrainedModel) -> dict[str, Any]:
    accepted = inspect.signature(model.forward).parameters
    if "input_ids" not in accepted:
        raise ValueError("it takes no input_ids")
    inputs: dict[str, Any] = {"input_ids": torch.arange(4, device=model.device)[None]}
    if "position_ids" in accepted:
        inputs["position_ids"] = torch.arange(4, device=model.device)[None]
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradients, then put back training flags, buffers and random state."""
    training = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = list({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for module, name, buffer, values in buffers:
            with torch.no_grad():
                buffer.copy_(values)
            module._buffers[name] = buffer


def hand_on_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook: pass position ids to the attention calls of a model that uses them for its embeddings only."""
    position_ids = argument(module, args, kwargs, "position_ids")
    return None if position_ids is None else (args, {**kwargs, POSITIONS: position_ids})


def refuse_restarts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: refuse packed samples where attention cannot be told about them."""
    position_ids = argument(module, args, kwargs, "position_ids")
    if (
        position_ids is not None
        and kwargs.get("attention_mask") is None
        and bool((position_ids.diff(dim=-1) != 1).any())
    ):
        raise ValueError(
            f"{type(module).__name__} does not pass position_ids to its attention, so packed samples would see one "
            f"another; give each sample its own row"
        )


POSITION_HOOKS = (hand_on_positions, refuse_restarts)


def add_position_hook(model: PreTrainedModel, keywords: set[str]) -> None:
    """Make packed samples visible to attention, given the keywords that reach it without help."""
    owner = mask_owner(model)
    if "position_ids" in keywords or "position_ids" not in inspect.signature(owner.forward).parameters:
        return
    add_hook(owner, hand_on_positions)
    try:
        arrives = POSITIONS in verify_routing(model, None)
    except ValueError:
        arrives = False
    if not arrives:
        remove_hooks(model, POSITION_HOOKS)
        add_hook(owner, refuse_restarts)
