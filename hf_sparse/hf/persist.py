"""Loading and saving models and adapters together with the pattern they were trained under."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import transformers

from .active import is_switched, settings
from .added_weights import added_names, read_added_weights, trained_apart
from .extension import extension_of, restore_extension
from .extension.record import EXTENSION
from .global_projections import projects
from .learned_sinks import NAME as SINKS
from .loading import (
    CAUSAL_LM,
    base_of,
    hub_arguments,
    load_base,
    patch_as_saved,
    put_adapter,
    read_adapter_config,
    read_config,
    read_extension,
    read_sidecar,
    stored_settings,
)
from .sources import SIDECAR, is_adapter
from .stored_settings import settings_to_json

_AUTO_CLASSES = {
    "CAUSAL_LM": CAUSAL_LM,
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


def load(path_or_adapter: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Return the model saved there, running under the pattern it was saved with.

    A checkpoint (folder or hub id) gives a model of the class it was saved as. An adapter folder gives its base model,
    extended and patched, with the adapter on top as a `PeftModel`. Only safetensors are read. Global projections and
    learned sinks come back too, though transformers, which has no place for them, reports them as unexpected before
    they are read.

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
    if os.path.isdir(path) and is_adapter(path):
        return _load_adapter(path, **kwargs)
    config = read_config(path, kwargs)
    saved = stored_settings(config, path)
    if saved is None:
        raise ValueError(
            f"{path} was saved without a pattern; load it with from_pretrained and use hf_sparse.patch_model"
        )
    model = load_base(path, _class_of(config, path), **kwargs)
    patch_as_saved(model, saved, f"the config of {path}")
    read_added_weights(model, path, required=True, **hub_arguments(kwargs))
    return model


def _class_of(config: Any, path: str) -> str:
    """Return the name of the class a model was saved as."""
    architecture = (getattr(config, "architectures", None) or [CAUSAL_LM])[0]
    if not hasattr(transformers, str(architecture)):
        raise ValueError(
            f"{path} was saved as {architecture!r}, which this transformers does not have; update it"
        )
    return str(architecture)


def _load_adapter(path: str, *, is_trainable: bool = False, **kwargs: Any) -> Any:
    saved, extension = read_sidecar(path), read_extension(path)
    config = read_adapter_config(path)
    base = base_of(path, config)
    try:
        class_name = _AUTO_CLASSES.get(config.get("task_type") or "") or _class_of(
            read_config(base, kwargs), base
        )
        # A task's own head is missing from its base, and comes with the adapter.
        model = load_base(base, class_name, own_head=class_name != CAUSAL_LM, **kwargs)
    except ValueError as error:
        raise ValueError(f"the base model of adapter {path} cannot be loaded: {error}") from error
    # before the adapter: modules it brings along belong to the extended and patched model
    restore_extension(model, extension, os.path.join(path, SIDECAR))
    patch_as_saved(model, saved, os.path.join(path, SIDECAR))
    read_added_weights(model, base, required=False, **hub_arguments(kwargs))
    return put_adapter(model, path, is_trainable=is_trainable)


def save_adapter(
    model: Any, folder: str | os.PathLike[str], *, state_dict: dict[str, Any] | None = None
) -> None:
    """Save the active adapter of a patched `PeftModel` with its pattern beside it, and how its base was extended, if it
    was; `hf_sparse.load` reads all of it.

    The files are written elsewhere and moved in, the pattern last: without it the folder does not load. What
    the pattern added and was trained belongs to the adapter when it was made with
    ``modules_to_save=["query_global", "key_global", "value_global"]`` (global projections) or ``["learned_sinks"]``.

    Args:
        state_dict: the weights, where the model's own are spread over processes.
    Raises:
        ValueError: not a PeftModel, not patched, or with trained projections or sinks that would be lost.
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
    _refuse_lost_weights(model)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    name = model.active_adapter
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        model.save_pretrained(
            str(staging), safe_serialization=True, state_dict=state_dict, selected_adapters=[name]
        )
        made = staging if name == "default" else staging / name  # where peft puts one of another name
        # peft's template names the base by its path, and would replace a card that somebody wrote
        (made / "README.md").unlink(missing_ok=True)
        content = settings_to_json(current)
        if (extension := extension_of(model)) is not None:
            content[EXTENSION] = extension.to_json()
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (target / SIDECAR).unlink(missing_ok=True)
        for written in sorted(p for p in made.rglob("*") if p.is_file()):
            place = target / written.relative_to(made)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(written, place)
        (staging / SIDECAR).write_text(text, encoding="utf-8")
        os.replace(staging / SIDECAR, target / SIDECAR)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _refuse_lost_weights(model: Any) -> None:
    """Raise ValueError where what the pattern added was trained and is neither in the adapter nor in its base."""
    name = trained_apart(model.get_base_model())
    if name is None:
        return
    base = base_of("of this model", model.peft_config[model.active_adapter].to_dict())
    stored = stored_settings(read_config(base, {}), base)
    owner, _, last = name.rpartition(".")
    needed = added_names(model.get_base_model().get_submodule(owner))
    if stored is None or not (stored.learned_sinks if last == SINKS else projects(stored.pattern)):
        raise ValueError(
            f"{name} was trained but is part of neither the adapter nor its base model {base}; make the adapter with "
            f"modules_to_save={list(needed)}, or save the whole model first"
        )
