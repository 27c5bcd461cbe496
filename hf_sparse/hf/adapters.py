"""Putting an adapter on a model in memory, under the pattern it was trained with or not at all."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from .active import is_switched, settings
from .added_weights import read_added_weights
from .extension import restore_extension
from .loading import (
    base_of,
    check_weights,
    patch_as_saved,
    put_adapter,
    read_adapter_config,
    read_config,
    read_extension,
    read_sidecar,
    reason,
)
from .patch import unpatch_model
from .sources import ADAPTER_CONFIG, SIDECAR, is_adapter
from .stored_settings import SparseSettings


def load_adapter(model: Any, folder: str | os.PathLike[str], *, is_trainable: bool = False) -> Any:
    """Return `model` as a `PeftModel` with the adapter of that folder on it, under the adapter's own pattern.

    A dense model is patched first; one that is patched must run the same pattern in the same layers. Where weights of
    the adapter turn out to be of another shape, the model is of no use afterwards.

    Raises:
        ValueError: no adapter there or a damaged one, a model that runs another pattern, was extended otherwise, has an
            adapter already, or is not of the kind that the adapter was trained on.
    """
    path, name = os.fspath(folder), type(model).__name__
    if hasattr(model, "peft_config"):
        raise ValueError(f"{name} has an adapter already; load {path} on the base model itself")
    if not is_adapter(path):
        raise ValueError(f"{path} holds no {ADAPTER_CONFIG}; give a folder that hf_sparse.save_adapter wrote")
    saved, extension, config = read_sidecar(path), read_extension(path), read_adapter_config(path)
    base = base_of(path, config)
    _check_kind(model, path, base)
    sidecar = os.path.join(path, SIDECAR)
    restore_extension(model, extension, sidecar, extend=False)
    dense = not is_switched(model)
    if dense:
        patch_as_saved(model, saved, sidecar)
    else:
        _check_pattern(settings(model), saved, path, name)
    try:
        check_weights(model, path, config)
        if dense:
            read_added_weights(model, base, required=False)
    except ValueError:
        if dense:
            unpatch_model(model)
        raise
    try:
        return put_adapter(model, path, is_trainable=is_trainable)
    except ValueError as error:
        raise ValueError(
            f"the adapter trained on {base} does not fit {name} ({reason(error.__cause__ or error)}); "
            f"load {base} for it"
        ) from error


def _check_pattern(current: SparseSettings | None, saved: SparseSettings, folder: str, name: str) -> None:
    """Raise ValueError where the model runs another pattern than the adapter was trained under."""
    assert current is not None
    if replace(current, backend=saved.backend) != saved:
        raise ValueError(
            f"adapter {folder} was trained under {_said(saved)}, and {name} runs {_said(current)}; call "
            "hf_sparse.unpatch_model(model) first to get the adapter's, or load_adapter before patching otherwise"
        )


def _said(one: SparseSettings) -> str:
    where = "" if one.layers is None else f" in layers {list(one.layers)}"
    return f"{one.pattern}{where}{' with learned sinks' if one.learned_sinks else ''}"


def _check_kind(model: Any, folder: str, base: str) -> None:
    """Raise ValueError where the base of an adapter is at hand and is of another shape than the model."""
    if not os.path.isdir(base):
        return
    ours, theirs = (_shape(config) for config in (model.config, read_config(base, {})))
    if ours != theirs:
        raise ValueError(
            f"adapter {folder} was trained on {base} ({theirs}), and this model is {ours}; load {base} for it"
        )


def _shape(config: Any) -> str:
    text = config.get_text_config()
    return f"{text.model_type} with {text.num_hidden_layers} layers of width {text.hidden_size}"
