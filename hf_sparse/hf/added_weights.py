"""Weights that a pattern adds to a model, in files of a checkpoint: `from_pretrained` has no place for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .global_projections import NAMES, has_projections, own_layers, plain_layer
from .learned_sinks import NAME, has_sinks


def read_added_weights(model: PreTrainedModel, source: str, *, required: bool, **hub: Any) -> None:
    """Put the global projections and learned sinks saved in a folder or on the hub into a patched model.

    Args:
        required: they must be there; else the model keeps what patching made where there are none.
        hub: where on the hub, as for ``from_pretrained``.
    Raises:
        ValueError: files that cannot be read, or that hold only some of them.
    """
    prefix = f"{model.base_model_prefix}."
    wanted = {
        f"{path}.{name}.{part}".removeprefix(prefix): tensor
        for path, module in model.named_modules()
        for name in added_names(module)
        for part, tensor in module.get_submodule(name).named_parameters()
    }
    if not wanted:
        return
    found: dict[str, Tensor] = {}
    try:
        for file in _files(source, hub):
            with safe_open(file, framework="pt") as tensors:
                keys = {key.removeprefix(prefix): key for key in tensors.keys()}  # noqa: SIM118 - not a dict
                found |= {name: tensors.get_tensor(keys[name]) for name in wanted if name in keys}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"the weights that the pattern added in {source} cannot be read ({error}); save it again"
        ) from error
    missing = sorted(wanted.keys() - found.keys())
    if missing and (required or found):
        raise ValueError(
            f"{source} lacks {len(missing)} weights that its pattern adds, such as {missing[0]}; save it again"
        )
    with torch.no_grad():
        for name, tensor in found.items():
            wanted[name].copy_(tensor)


def trained_apart(model: nn.Module) -> str | None:
    """Return the name of an added module that an adapter on `model` would not save, though it was trained."""
    for path, module in model.named_modules():
        if has_sinks(module):
            member = module.get_submodule(NAME)
            held = hasattr(member, "modules_to_save")
            if not held and bool(member.get_parameter("weight").any()):
                return f"{path}.{NAME}"
        if not has_projections(module):
            continue
        for name, own in zip(NAMES, own_layers(module), strict=True):
            member = module.get_submodule(name)
            if hasattr(member, "modules_to_save"):
                continue
            ours, theirs = plain_layer(member), plain_layer(module.get_submodule(own))
            assert ours is not None and theirs is not None
            if not torch.equal(ours.weight, theirs.weight):
                return f"{path}.{name}"
    return None


def added_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that a pattern has added to this attention module, as adapters name them."""
    return (*(NAMES if has_projections(module) else ()), *((NAME,) if has_sinks(module) else ()))


def _files(source: str, hub: dict[str, Any]) -> list[str]:
    """Return the safetensors files of a checkpoint, its shards where there are several."""
    quiet = {"_raise_exceptions_for_missing_entries": False, **hub}
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **quiet)
    names = [SAFE_WEIGHTS_NAME]
    if index is not None:
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return [file for name in names if (file := cached_file(source, name, **quiet)) is not None]
