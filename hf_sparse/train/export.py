"""What becomes of a finished adapter: a whole model with its weights merged in, or a folder on the hub."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainingArguments

from ..evaluate.output_folder import check_output_folder
from ..hf import load
from ..hf.extension import extension_of
from ..hf.loading import base_of, load_tokenizer, read_adapter_config, read_sidecar, reason
from ..hf.sources import ADAPTER_CONFIG, check_source, is_adapter
from .card import merged_card, write_card

COMMIT = "Upload the adapter with its pattern"


def merge(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the base model with the adapter merged into its weights, with pattern, tokenizer and card; return `output`.

    `hf_sparse.load` runs it under the pattern and gives the adapter's logits. The folder appears whole or not at all.

    Args:
        dtype: of the weights, in which they are also merged; None keeps that of the base.
        overwrite: replace the model that is in `output`.
    Raises:
        ValueError: no adapter, one without a pattern or of a kind that cannot be merged, an output folder that exists,
            lies inside the adapter or its base or holds one of them, or too little space.
    """
    source, target = os.fspath(adapter), Path(output).resolve()
    if not (os.path.isdir(source) and is_adapter(source)):
        raise ValueError(
            f"{source} is no adapter folder: it holds no {ADAPTER_CONFIG}; give the folder that save_adapter or a "
            "training wrote"
        )
    saved = read_sidecar(source)
    base = base_of(source, read_adapter_config(source))
    try:
        check_source(base)
    except ValueError as error:
        raise ValueError(f"the base model of adapter {source} cannot be found: {error}") from None
    _check_target(target, os.fspath(output), {"the adapter": source, "its base model": base}, overwrite)
    tokenizer = load_tokenizer(
        source if os.path.exists(os.path.join(source, "tokenizer_config.json")) else base
    )
    model = _merged(load(source, dtype="auto" if dtype is None else dtype), source)
    if (
        extension := extension_of(model)
    ) is not None:  # the base's tokenizer would cut texts to what the base reads
        tokenizer.model_max_length = max(tokenizer.model_max_length, extension.length)
    card = merged_card(model, saved, source, base)

    target.parent.mkdir(parents=True, exist_ok=True)
    _check_space(model, target)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        write_card(staging, card)
        _settle(staging)
        _replace(staging, target)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"the merged model cannot be written to {target} ({reason(error)}); make room there, or name another folder"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Path(output)


def _check_target(target: Path, name: str, sources: dict[str, str], overwrite: bool) -> None:
    """Raise ValueError where the merged model may not go to `target`; `sources` are what must not be lost."""
    check_output_folder("the output folder", name)
    for what, source in sources.items():
        place = Path(source).resolve()
        if os.path.isdir(source) and (target == place or place in target.parents or target in place.parents):
            raise ValueError(
                f"the output folder {name} and {what}, {source}, lie in one another; name a folder beside it"
            )
    if not target.exists():
        return
    if not overwrite:
        raise ValueError(
            f"the output folder {name} exists; name another one, or say that it may be overwritten"
        )
    if not (target / "config.json").is_file():
        raise ValueError(
            f"the output folder {name} holds no config.json, so it is no model to be replaced; name another folder"
        )


def _merged(model: Any, source: str) -> Any:
    """Return the model inside a PeftModel with the adapter in its weights."""
    kind = model.peft_config[model.active_adapter].peft_type.value
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(
            f"{source} is of the type {kind}, which has no weights to merge; use it as it is, with hf_sparse.load"
        )
    base = model.get_base_model()
    if _adapts_a_tied_weight(base):
        raise ValueError(
            f"{source} changes one of the embeddings and the head of {type(base).__name__}, which share their weight: "
            "merged in, it would change both; use it as it is, with hf_sparse.load"
        )
    try:
        with warnings.catch_warnings():
            # trained embeddings leave a tied head behind: peft unties the config, and says so
            warnings.filterwarnings("ignore", message=".*no longer tied after merging.*")
            return model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        # such as a quantised base, or weights with nan
        raise ValueError(
            f"adapter {source} cannot be merged into its base ({reason(error)}); use it as it is, with hf_sparse.load"
        ) from error


def _adapts_a_tied_weight(base: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    head, tokens = base.get_output_embeddings(), base.get_input_embeddings()
    tied = head is not None and head.weight is tokens.weight
    return tied and any(isinstance(module, BaseTunerLayer) for module in (head, tokens))


def _check_space(model: Any, target: Path) -> None:
    needed, free = model.get_memory_footprint(), shutil.disk_usage(target.parent).free
    if needed > free:
        raise ValueError(
            f"the merged model takes {needed / 2**20:,.0f} MiB and {target.parent} has {free / 2**20:,.0f} MiB left; "
            "make room there, or name another folder"
        )


def _settle(folder: Path) -> None:
    """Let a folder of files be on the disk, readable to those who may read what its owner writes."""
    mask = os.umask(0)  # mkdtemp gives 0700, and safetensors 0600; give what mkdir() and open() would
    os.umask(mask)
    for path in (*folder.rglob("*"), folder):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(staging: Path, target: Path) -> None:
    """Let `target` be the folder `staging`; what was there is put aside first and deleted last."""
    if not target.exists():
        staging.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        target.rename(aside / target.name)
        try:
            staging.rename(target)
        except OSError:
            (aside / target.name).rename(target)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_push(training: TrainingArguments, model: str) -> None:
    """Raise ValueError where `push` could not work after the training: no valid name, or not logged in to the hub.

    Nor would an adapter of a `model` in a folder be of use to others: it names its base by that path.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    if os.path.isdir(model):
        raise ValueError(
            f"push_to_hub would publish an adapter whose base is the folder {model} of this machine; name the model by "
            "its hub id, or train without push_to_hub, merge the adapter and upload the whole model."
        )
    name = hub_name(training)
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(
            f"push_to_hub needs the name of a repository on the hub, got {name!r}; give hub_model_id, such as org/name."
        ) from None
    try:
        HfApi(token=training.hub_token).whoami()
    except (LocalTokenNotFoundError, HfHubHTTPError):
        raise ValueError(
            f"push_to_hub to {name} needs a token that the hub knows; log in with: hf auth login, or set HF_TOKEN."
        ) from None
    except Exception as error:  # noqa: BLE001 - out of reach: each version of the client has its own classes for that
        raise ValueError(
            f"push_to_hub to {name}: the hub cannot be reached ({reason(error)}); train without it and push the "
            "finished adapter later."
        ) from None


def push(folder: str | os.PathLike[str], training: TrainingArguments) -> str:
    """Upload a finished adapter's folder to the hub, make its repository where there is none, and return its address.

    Nothing else goes there: no checkpoint, no state of the optimizer.

    Raises:
        ValueError: the hub did not take it; the folder is as it was.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=training.hub_token)
    try:
        repository = api.create_repo(hub_name(training), private=training.hub_private_repo, exist_ok=True)
        if training.hub_revision:
            api.create_branch(repository.repo_id, branch=training.hub_revision, exist_ok=True)
        api.upload_folder(
            folder_path=os.fspath(folder),
            repo_id=repository.repo_id,
            revision=training.hub_revision,
            commit_message=COMMIT,
        )
    except Exception as error:  # each version of the client has its own classes, and none may hide the folder
        raise ValueError(
            f"the adapter is in {os.fspath(folder)}, and could not be pushed to {hub_name(training)} "
            f"({reason(error)}); push it with: hf upload {hub_name(training)} {shlex.quote(os.fspath(folder))}"
        ) from error
    return str(repository)


def hub_name(training: TrainingArguments) -> str:
    """Return the repository a training's adapter goes to: hub_model_id, or the last name of output_dir."""
    return training.hub_model_id or Path(str(training.output_dir)).resolve().name
