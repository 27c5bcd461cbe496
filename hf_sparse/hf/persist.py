"""Loading and saving models and adapters together with the pattern they were trained under."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel

from .patch import is_switched, patch_model, settings
from .stored_settings import SparseSettings, settings_from_json, settings_to_json

SIDECAR = "sparse_attention.json"
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


def load(path_or_adapter: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Return the model saved there, running under the pattern it was saved with.

    A checkpoint (folder or hub id) gives a model of the class it was saved as. An adapter folder gives its base model,
    patched, with the adapter on top as a `PeftModel`. Only safetensors are read.

    Args:
        kwargs: go to ``from_pretrained`` of the model; ``is_trainable=True`` of an adapter goes to peft.
    Raises:
        ValueError: nothing there, a file that is missing or corrupt, or no pattern saved with it.
    """
    path = os.fspath(path_or_adapter)
    if kwargs.get("use_safetensors", True) is not True:
        raise ValueError(
            "hf_sparse.load reads safetensors only; convert the checkpoint with save_pretrained first"
        )
    if os.path.isdir(path) and (_is_adapter(path)):
        return _load_adapter(path, **kwargs)
    config = _read_config(path, "model", kwargs)
    saved = getattr(config.get_text_config(), "sparse_attention", None)
    if saved is None:
        raise ValueError(
            f"{path} was saved without a pattern; load it with from_pretrained and use hf_sparse.patch_model"
        )
    wanted = settings_from_json(saved)
    return _patched_as(_load_model(path, config, None, kwargs), wanted)


def _is_adapter(path: str) -> bool:
    return any(
        os.path.exists(os.path.join(path, name)) for name in (_ADAPTER_CONFIG, _ADAPTER_WEIGHTS, SIDECAR)
    )


def _patched_as(model: PreTrainedModel, saved: SparseSettings) -> PreTrainedModel:
    return patch_model(model, saved.pattern, layers=saved.layers, backend=saved.backend)


def _read_config(path: str, role: str, kwargs: dict[str, Any]) -> Any:
    hub = {
        k: kwargs[k]
        for k in ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code")
        if k in kwargs
    }
    try:
        return AutoConfig.from_pretrained(path, **hub)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"there is no {role} at {path!r} ({reason}); give a folder with config.json or a hub id"
        ) from error


def _load_model(path: str, config: Any, auto_class: str | None, kwargs: dict[str, Any]) -> Any:
    architecture = (getattr(config, "architectures", None) or [None])[0]
    cls = getattr(transformers, auto_class or architecture or "AutoModelForCausalLM", None)
    if cls is None:
        raise ValueError(
            f"{path} was saved as {architecture!r}, which this transformers does not have; update it"
        )
    try:
        return cls.from_pretrained(path, **{**kwargs, "use_safetensors": True})
    except (
        Exception
    ) as error:  # safetensors raises its own type, transformers OSError, RuntimeError or ValueError
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"the model at {path!r} cannot be loaded ({reason}); save it again") from error


def _load_adapter(path: str, *, is_trainable: bool = False, **kwargs: Any) -> Any:
    saved = read_sidecar(path)
    config = _read_json(path, _ADAPTER_CONFIG)
    _check_weights(path)
    base_path = config.get("base_model_name_or_path")
    if not isinstance(base_path, str) or not base_path:
        raise ValueError(f"{path}/{_ADAPTER_CONFIG} names no base model; save the adapter again")
    base_config = _read_config(base_path, "base model", kwargs)
    base = _load_model(base_path, base_config, _AUTO_CLASSES.get(config.get("task_type") or ""), kwargs)
    from peft import PeftModel

    _patched_as(base, saved)  # before the adapter: modules it brings along belong to the patched model
    try:
        return PeftModel.from_pretrained(base, path, is_trainable=is_trainable)
    except Exception as error:  # peft passes on whatever its config classes and torch raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"the adapter at {path!r} does not fit its base model ({reason}); save it again"
        ) from error


def read_sidecar(path: str | os.PathLike[str]) -> SparseSettings:
    """Return the settings saved beside an adapter; raise ValueError where there are none or they cannot be read."""
    folder = os.fspath(path)
    if not os.path.exists(os.path.join(folder, SIDECAR)):
        raise ValueError(
            f"adapter {folder} has no {SIDECAR}, so its pattern is unknown; save it with hf_sparse.save_adapter, or "
            f"load it with peft and use hf_sparse.patch_model"
        )
    return settings_from_json(_read_json(folder, SIDECAR))


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


def _check_weights(folder: str) -> None:
    from safetensors import SafetensorError, safe_open

    file = os.path.join(folder, _ADAPTER_WEIGHTS)
    if not os.path.exists(file):
        raise ValueError(
            f"adapter {folder} has no {_ADAPTER_WEIGHTS}; other formats are not read, save it again"
        )
    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is corrupt ({str(error).splitlines()[0]}); save the adapter again"
        ) from error
    if not names:
        raise ValueError(f"{file} holds no tensors; save the adapter again")


def save_adapter(model: Any, folder: str | os.PathLike[str]) -> None:
    """Save the adapter of a patched `PeftModel` with its pattern beside it; `hf_sparse.load` reads both.

    The files are written elsewhere and moved in, the pattern last: without it the folder does not load.

    Raises:
        ValueError: not a PeftModel, or not patched.
    """
    if not hasattr(model, "peft_config"):
        raise ValueError(
            f"save_adapter needs a PeftModel, got {type(model).__name__}; use save_pretrained for whole models"
        )
    if not is_switched(model.get_base_model()):
        raise ValueError(
            "save_adapter needs a patched model, this one is dense; call hf_sparse.patch_model first"
        )
    current = settings(model)
    assert current is not None
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        model.save_pretrained(str(staging), safe_serialization=True)
        text = json.dumps(settings_to_json(current), indent=2, sort_keys=True) + "\n"
        (target / SIDECAR).unlink(missing_ok=True)
        for written in sorted(p for p in staging.rglob("*") if p.is_file()):
            place = target / written.relative_to(staging)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(written, place)
        (staging / SIDECAR).write_text(text, encoding="utf-8")
        os.replace(staging / SIDECAR, target / SIDECAR)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
