"""Rotary positions at other frequencies, computed by transformers itself from ``config.rope_parameters``.

linear: positions are divided by the factor (Chen et al., 2023, arXiv:2306.15595). ntk: the base is raised instead, so
that the lowest frequency is divided by the factor and the highest stays. dynamic: the same, as far as each text needs.
yarn: high frequencies stay, low ones are divided, and attention is sharpened (Peng et al., 2023, arXiv:2309.00071).
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from ..hooks import mask_owner

_FULL, _LOCAL = "full_attention", {"sliding_attention", "chunked_attention"}


def rotary_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return what computes the text model's rotary positions, [] where it has none that its config describes."""
    config = model.config.get_text_config()
    if not getattr(config, "rope_parameters", None) or getattr(config, "alibi", False):
        return []
    return [m for m in mask_owner(model).modules() if "RotaryEmbedding" in type(m).__name__]


def scale_config(config: Any, method: str, length: int, model: PreTrainedModel) -> None:
    """Change a text config so that transformers builds the model with positions for `length` tokens.

    Where layers of several kinds have rotary positions of their own, those with a window of their own keep them: they
    see no distance that they were not trained for.

    Raises:
        ValueError: frequencies that are scaled already, or layers of which it is not known how far they see.
    """
    name, parameters = type(model).__name__, config.rope_parameters
    kinds = {key: value for key, value in parameters.items() if isinstance(value, dict)}
    if not kinds:
        scaled = _scaled(config, parameters, method, length, model, "inv_freq")
    else:
        if _FULL not in kinds or kinds.keys() - _LOCAL - {_FULL}:
            raise ValueError(
                f"{name} has rotary positions for layers of the kinds {sorted(kinds)}, and it is not known which of "
                f"them see far; use a model with '{_FULL}' layers"
            )
        scaled = {
            **parameters,
            _FULL: _scaled(config, kinds[_FULL], method, length, model, f"{_FULL}_inv_freq"),
        }
    config.rope_parameters = scaled
    if method != "dynamic":  # which takes the length it was trained for from there
        config.max_position_embeddings = length


def rebuilt(modules: list[nn.Module], config: Any, method: str) -> list[nn.Module]:
    """Return for each rotary module one that transformers builds from the changed text config, on the CPU.

    Raises:
        ValueError: a module that is not built from the text config, or not with this method.
    """
    try:
        if hasattr(config, "validate"):  # as save_pretrained asks; Phi-3 takes no method but its own
            config.validate()
        with torch.device("cpu"):
            return [type(module)(config) for module in modules]
    except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise ValueError(
            f"transformers does not build {type(config).__name__} with {method!r} rotary positions "
            f"({' '.join(str(error).split())}); use another method"
        ) from error


def replace_rotary(modules: list[nn.Module], fresh: list[nn.Module]) -> None:
    """Give each module the frequencies and settings of its new version; its hooks and its device stay."""
    for module, new in zip(modules, fresh, strict=True):
        for name, value in vars(new).items():
            if not name.startswith("_") and name != "training":
                setattr(module, name, value)
        for name, buffer in new.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(module.get_buffer(name).device), persistent=False)


def _scaled(
    config: Any,
    parameters: dict[str, Any],
    method: str,
    length: int,
    model: PreTrainedModel,
    frequencies: str,
) -> dict[str, Any]:
    trained, kind = config.max_position_embeddings, parameters.get("rope_type", "default")
    if kind != "default":
        raise ValueError(
            f"the rotary positions of {type(model).__name__} are scaled already ({kind}, to {trained} tokens); "
            f"use a length of at most {trained} without extending, or a model with rope_type 'default'"
        )
    factor = length / trained
    size = 2 * len(rotary_modules(model)[0].get_buffer(frequencies))
    if method in ("ntk", "dynamic") and size == 2:
        raise ValueError(
            f"{type(model).__name__} rotates 2 channels of each head, all at the highest frequency, which {method!r} "
            "does not change; use linear or yarn"
        )
    if method == "ntk":
        return {**parameters, "rope_theta": parameters["rope_theta"] * factor ** (size / (size - 2))}
    original = {"original_max_position_embeddings": trained} if method == "yarn" else {}
    return {**parameters, "rope_type": method, "factor": factor, **original}
