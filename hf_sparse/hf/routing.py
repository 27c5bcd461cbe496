"""Whether a model's attention goes through transformers' AttentionInterface, found out before anything is promised."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ..backends import recording
from ..selectors import divided
from .attention import observed_inputs, observed_keywords
from .call_arguments import POSITIONS
from .dense import has_cross_attention
from .hooks import add_hook, argument, mask_owner, remove_hooks
from .stored_settings import SparseSettings, layer_count

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
    try:
        text = config.get_text_config()
    except ValueError as error:
        raise ValueError(
            f"{name} cannot be patched: it has several text models; patch the one that is meant"
        ) from error
    for kind in (config.model_type, text.model_type):
        if kind in _REFUSED_TYPES:
            raise ValueError(f"{name} cannot be patched: {_REFUSED_TYPES[kind]}; use another architecture")
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"{name} cannot be patched: its attention does not go through transformers' AttentionInterface; use "
            f"another architecture, e.g. Llama, Qwen, Mistral, GPT-2 or BERT"
        )


def attention_layers(config: Any) -> tuple[int, ...]:
    """Return the indices of the layers that have softmax attention, the decoder's; hybrids have others too."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if not kinds:
        return tuple(range(layer_count(config)))
    return tuple(i for i, kind in enumerate(kinds) if kind in _ATTENTION_KINDS)


def check_selecting_layers(settings: SparseSettings, config: Any) -> None:
    """Raise ValueError where content would decide in layers alone that have no keys: linear ones, convolutions."""
    if not settings.pattern.content_based:
        return
    with_keys = attention_layers(config)
    found = {
        layer: divided(settings.pattern_at(layer), layer).selector for layer in range(layer_count(config))
    }
    selecting = [layer for layer, selector in found.items() if selector is not None]
    if selecting and not set(selecting) & set(with_keys):
        raise ValueError(
            f"layer {selecting[0]} has no attention whose keys {found[selecting[0]]} could select; give the pattern to "
            f"layers {', '.join(map(str, with_keys))}"
        )


def has_encoder(model: PreTrainedModel) -> bool:
    """True where the patterned text model is a decoder that may attend to an encoder."""
    return has_cross_attention(model.config) or has_cross_attention(model.config.get_text_config())


def is_causal(model: PreTrainedModel) -> bool:
    """Return whether the attention that runs the pattern is causal; that of encoders is not."""
    if has_encoder(model):
        return True
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
        with untouched(model), recording() as recorder, observed_keywords() as keywords:
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
    if has_encoder(model):
        _verify_decoder(model, [call.layer for call in recorder.calls], list(expected))
    if layers is not None and (missing := set(layers) - {call.layer for call in recorder.calls}):
        raise ValueError(
            f"layers {sorted(missing)} of {name} made no attention call of their own; choose among "
            f"{sorted({call.layer for call in recorder.calls})}"
        )
    return set.intersection(*keywords)


def heads_of_calls(model: PreTrainedModel) -> dict[nn.Module, int]:
    """Return the modules that call the pattern in a switched model, each with the query heads of its calls."""
    with untouched(model), observed_inputs() as calls:
        model(**_probe_inputs(model))
    return {module: query.shape[1] for module, query, _ in calls}


def _verify_decoder(model: PreTrainedModel, ran: list[int], expected: list[int]) -> None:
    """Raise ValueError unless every layer of the decoder ran the pattern, once, and the decoder makes its masks."""
    name = type(model).__name__
    if sorted(ran) != expected:
        raise ValueError(
            f"{name} cannot be patched: of the attention calls of its {len(expected)} decoder layers it cannot be told "
            f"which are those of the decoder to itself; use another architecture, e.g. BART, Marian or Whisper"
        )
    if mask_owner(model) not in set(model.get_decoder().modules()):
        raise ValueError(
            f"{name} cannot be patched: its decoder is not the last of its models; patch one of its models that has no "
            f"other after the decoder"
        )


def _probe_inputs(model: PreTrainedModel) -> dict[str, Any]:
    accepted = inspect.signature(model.forward).parameters
    if "decoder_input_ids" in accepted:
        return _probe_inputs_with_encoder(model)
    if "input_ids" not in accepted:
        raise ValueError("it takes no input_ids")
    inputs: dict[str, Any] = {"input_ids": torch.arange(4, device=model.device)[None]}
    if "position_ids" in accepted:
        inputs["position_ids"] = torch.arange(4, device=model.device)[None]
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if "encoder_hidden_states" in accepted and getattr(model.config, "add_cross_attention", False):
        inputs["encoder_hidden_states"] = _encoded(model)
    return inputs


def _probe_inputs_with_encoder(model: PreTrainedModel) -> dict[str, Any]:
    """Return 4 tokens for decoder and encoder; for an encoder that hears or sees, what it would return."""
    inputs: dict[str, Any] = {
        "decoder_input_ids": torch.arange(4, device=model.device)[None],
        "use_cache": False,
    }
    if "input_ids" in inspect.signature(model.forward).parameters and model.main_input_name == "input_ids":
        inputs["input_ids"] = torch.arange(4, device=model.device)[None]
    else:
        inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=_encoded(model.get_encoder()))
    return inputs


def _encoded(model: PreTrainedModel) -> torch.Tensor:
    return torch.zeros(1, 4, model.config.hidden_size, dtype=model.dtype, device=model.device)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
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
    add_hook(owner, hand_on_positions, first=True)  # the caller's, before they are changed
    try:
        arrives = POSITIONS in verify_routing(model, None)
    except ValueError:
        arrives = False
    if not arrives:
        remove_hooks(model, POSITION_HOOKS)
        add_hook(owner, refuse_restarts, first=True)
