"""Reading a base model, its tokenizer and an adapter: whatever is wrong with their files is one ValueError."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from .extension.record import EXTENSION, Extension, extension_from_json
from .patch import patch_model
from .sources import ADAPTER_CONFIG, ADAPTER_WEIGHTS, SIDECAR, check_path
from .stored_settings import SparseSettings, settings_from_json

CAUSAL_LM = "AutoModelForCausalLM"
_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code")
_SAVED = "base_model.model."  # before the name of every layer's weight that peft saves
_REASON = 240  # characters of another library's message that are quoted


def read_config(source: str, kwargs: dict[str, Any]) -> Any:
    """Return the model's config; of `kwargs` those are used that say where on the hub it is."""
    check_path(source)
    try:
        return AutoConfig.from_pretrained(source, **hub_arguments(kwargs))
    except Exception as error:  # a broken file makes any part of transformers stumble
        raise ValueError(
            f"the config of {source} cannot be loaded ({reason(error)}); "
            f"give a folder or hub id with a config.json that transformers {transformers.__version__} knows"
        ) from error


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return those of ``from_pretrained``'s arguments that say where on the hub a model is."""
    return {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}


def stored_settings(config: Any, source: str) -> SparseSettings | None:
    """Return the pattern that was saved in a model's config, None where there is none."""
    saved = getattr(config.get_text_config(), "sparse_attention", None)
    return None if saved is None else _settings(saved, f"the config of {source}")


def load_base(source: str, class_name: str = CAUSAL_LM, *, own_head: bool = False, **kwargs: Any) -> Any:
    """Return the dense model in a folder or on the hub, read from safetensors, with every weight from its files.

    Args:
        class_name: of transformers, what to build.
        own_head: the class's head, and a pooler, need not be in the files: an adapter brings them.
        kwargs: go to ``from_pretrained``.
    Raises:
        ValueError: nothing there, files that cannot be read, or weights that they lack.
    """
    read_config(source, kwargs)
    try:
        model, info = getattr(transformers, class_name).from_pretrained(
            source, **{**kwargs, "use_safetensors": True, "output_loading_info": True}
        )
    # safetensors raises its own type, transformers OSError, RuntimeError or ValueError
    except Exception as error:
        raise ValueError(
            f"the model at {source} cannot be loaded ({reason(error)}); "
            f"give a folder written by save_pretrained, with safetensors that fit {class_name}"
        ) from error
    body = "" if model.base_model is model else f"{model.base_model_prefix}."
    missing = [
        name
        for name in sorted(info["missing_keys"])
        if not (own_head and (not name.startswith(body) or "pooler." in name))
    ]
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}; save it again"
        )
    return model


def language_model_class(config: Any) -> str:
    """Return the class of transformers to load with: an encoder saved with a masked-token head keeps that."""
    saved_as = set(getattr(config, "architectures", None) or ())
    masked = not config.is_encoder_decoder and saved_as & set(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
    return "AutoModelForMaskedLM" if masked else CAUSAL_LM


def load_tokenizer(source: str) -> Any:
    """Return the tokenizer saved beside a model; raise ValueError where there is none or it cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(
            f"the tokenizer of {source} cannot be loaded ({reason(error)}); "
            "write it there with its save_pretrained"
        ) from error


def read_sidecar(path: str | os.PathLike[str]) -> SparseSettings:
    """Return the settings saved beside an adapter; raise ValueError where there are none or they cannot be read."""
    folder = os.fspath(path)
    if not os.path.exists(os.path.join(folder, SIDECAR)):
        raise ValueError(
            f"adapter {folder} has no {SIDECAR}, so its pattern is unknown; save it with hf_sparse.save_adapter, or "
            f"load it with peft and use hf_sparse.patch_model"
        )
    saved = _read_json(folder, SIDECAR)
    saved.pop(EXTENSION, None)
    return _settings(saved, os.path.join(folder, SIDECAR))


def read_extension(folder: str) -> Extension | None:
    """Return how the base of an adapter was extended, None where it was not; ValueError for what cannot be read."""
    saved = _read_json(folder, SIDECAR).get(EXTENSION)
    return None if saved is None else extension_from_json(saved, os.path.join(folder, SIDECAR))


def read_adapter_config(folder: str) -> dict[str, Any]:
    """Return adapter_config.json of an adapter whose type the installed peft knows, and whose weights are there."""
    config = _read_json(folder, ADAPTER_CONFIG)
    import peft

    kind = config.get("peft_type")
    if kind not in {known.value for known in peft.PeftType}:
        raise ValueError(
            f"adapter {folder} is of the type {kind!r}, which peft {peft.__version__} does not have; "
            "update peft, or save the adapter again"
        )
    adapter_weights(folder)
    return config


def base_of(folder: str, config: dict[str, Any]) -> str:
    """Return the folder or hub id of the base model that an adapter's config names."""
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{os.path.join(folder, ADAPTER_CONFIG)} names no base model; save the adapter again"
        )
    return base


def patch_as_saved(model: Any, saved: SparseSettings, where: str) -> Any:
    """Patch the model with settings read from `where`, and return it."""
    try:
        return patch_model(model, saved)
    except ValueError as error:
        raise ValueError(f"the pattern saved in {where} does not fit: {error}") from error


def put_adapter(model: Any, folder: str, name: str = "default", *, is_trainable: bool = False) -> Any:
    """Return the model, or the PeftModel, with the adapter on it under that name.

    Raises:
        ValueError: an adapter that is damaged, of an unknown type, incomplete, or of another model.
    """
    config = read_adapter_config(folder)
    from peft import PeftModel

    check_weights(model.get_base_model() if isinstance(model, PeftModel) else model, folder, config)
    try:
        with warnings.catch_warnings():
            # Adapter weights that are not there would be left at random.
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            if not isinstance(model, PeftModel):
                return PeftModel.from_pretrained(model, folder, name, is_trainable=is_trainable)
            model.load_adapter(folder, name, is_trainable=is_trainable)
            return model
    except Exception as error:  # peft passes on whatever its config classes and torch raise
        raise ValueError(
            f"adapter {folder} does not fit its base model ({reason(error)}); save it again"
        ) from error


def check_weights(model: Any, folder: str, config: dict[str, Any]) -> None:
    """Raise ValueError where a weight of the adapter belongs to a module that the model lacks: peft would drop it.

    Args:
        model: without any adapter, or the base model of a `PeftModel`.
        config: the adapter's, as `read_adapter_config` gives it.
    """
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    own = PEFT_TYPE_TO_PREFIX_MAPPING[
        PeftType(config["peft_type"])
    ]  # of the names peft gives to what it adds
    modules = {name for name, _ in model.named_modules()}
    for weight in adapter_weights(folder):
        path = weight.removeprefix(_SAVED)
        if path == weight:
            continue  # shared by all layers, such as VeRA's, or none of a layer, such as virtual tokens
        added = re.search(rf"\.({own}|token_adapter\.)", path)
        place = path[: added.start()] if added else path.rpartition(".")[0]
        if place.replace(".base_layer", "") not in modules:
            raise ValueError(
                f"adapter {folder} was trained on {config.get('base_model_name_or_path')} and has the weight {path}, "
                f"for which {type(model).__name__} has no place; load what it was trained on"
            )


def reason(error: BaseException) -> str:
    """Return the first sentence of another library's message on one line, not too long, with no stop at its end."""
    text = re.split(r"\. (?=[A-Z])", " ".join(str(error).split()))[0] or type(error).__name__
    if not isinstance(error, (OSError, ValueError, RuntimeError, UserWarning)):
        text = f"{type(error).__name__}: {text}"
    if len(text) > _REASON:
        text = text[:_REASON].rpartition(" ")[0] + " ..."
    return text if text.endswith("...") else text.rstrip(".")


def _settings(saved: Any, where: str) -> SparseSettings:
    try:
        return settings_from_json(saved)
    except ValueError as error:
        raise ValueError(f"{where} holds no usable pattern: {error}") from error


def _read_json(folder: str, name: str) -> dict[str, Any]:
    file = os.path.join(folder, name)
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"adapter {folder} has no {name}; save it again") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not readable JSON ({error}); save the adapter again") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} must hold a JSON object, got {type(content).__name__}; save the adapter again"
        )
    return content


def adapter_weights(folder: str) -> list[str]:
    """Return the names of the weights in an adapter's file; raise ValueError where it cannot be read or has none."""
    from safetensors import SafetensorError, safe_open

    file = os.path.join(folder, ADAPTER_WEIGHTS)
    if not os.path.exists(file):
        raise ValueError(
            f"adapter {folder} has no {ADAPTER_WEIGHTS}; other formats are not read, save it again"
        )
    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is corrupt ({reason(error)}); save the adapter again") from error
    if not names:
        raise ValueError(f"{file} holds no tensors; save the adapter again")
    return names
