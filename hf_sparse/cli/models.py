"""Loading what the user names: a hub id, a local model, or an adapter folder; every failure one sentence."""

from __future__ import annotations

import argparse
import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
ADAPTER, SIDECAR = "adapter_config.json", "sparse_attention.json"
CONTROL = "control"  # what peft calls the second adapter
HUB_SECONDS = 10  # to find out whether the hub has a model


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="hub id, model folder, or adapter folder (it knows its base)"
    )
    parser.add_argument("--adapter", metavar="FOLDER", help="peft adapter folder to put on MODEL")
    parser.add_argument("--control", metavar="FOLDER", help="adapter trained the same way on the dense model")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the weights (default: as they were saved)"
    )
    parser.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)"
    )


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the model, in its adapter where there is one and patched as it was saved, and its tokenizer.

    Raises:
        ValueError: anything that keeps either from being loaded.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = _device(args.device)
    adapter, base = args.adapter, args.model
    for flag in ("adapter", "control"):
        if (folder := getattr(args, flag)) and not _is_adapter(folder):
            raise ValueError(f"--{flag} {folder} holds no {ADAPTER}; give a folder that peft saved.")
    if _is_adapter(args.model):
        if adapter:
            raise ValueError(
                f"{args.model} is an adapter itself; give its base as MODEL, or leave out --adapter."
            )
        adapter, base = args.model, _base_of(args.model)
    if args.control and not adapter:
        raise ValueError(
            "--control goes with an adapter to compare it with; give one as MODEL or with --adapter."
        )
    check_source(base)
    if adapter and not args.pattern and not (Path(adapter) / SIDECAR).exists():
        raise ValueError(
            f"adapter {adapter} has no {SIDECAR}, so its pattern is unknown; name one with --pattern."
        )
    with _one_sentence(base):
        model = _load_base(base, args.dtype)
        tokenizer = _load_tokenizer(base)
    if adapter:
        from peft import PeftModel

        with _one_sentence(f"adapter {adapter}"):
            _patch_as_saved(model, adapter)
            model = PeftModel.from_pretrained(model, adapter)
    if args.control:
        with _one_sentence(f"adapter {args.control}"):
            model.load_adapter(args.control, CONTROL)
    return model.to(device).eval(), tokenizer


def _base_of(adapter: str) -> str:
    """Return the base model that an adapter folder names."""
    try:
        base = json.loads((Path(adapter) / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
        check_source(base)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"the base model of adapter {adapter} cannot be found ({reason.rstrip('.')}); "
            f"name it with: hf-sparse eval BASE --adapter {adapter}"
        ) from None
    return base


def _load_base(source: str, dtype: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..hf import load

    config = AutoConfig.from_pretrained(source)
    if getattr(config.get_text_config(), "sparse_attention", None) is not None:
        return load(source, dtype=dtype)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{source} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}."
        )
    return model


def _load_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source)


def _patch_as_saved(base: Any, adapter: str) -> None:
    from ..hf import patch_model, read_sidecar

    if (Path(adapter) / SIDECAR).exists():
        saved = read_sidecar(adapter)
        patch_model(base, saved.pattern, layers=saved.layers, backend=saved.backend)


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"--device {name} is not usable on this machine; try --device cpu") from None
    return device


def check_source(source: str) -> None:
    """Raise ValueError for what is neither a model folder, nor in the hub's cache, nor on the hub.

    Asked for a name it cannot find, transformers tries the hub for most of a minute; this asks once.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").exists() and not _is_adapter(source):
            raise ValueError(f"{source} holds neither config.json nor {ADAPTER}; give a model folder.")
        return
    if path.exists():
        raise ValueError(f"{source} is a file; give the model's folder, or a hub id.")
    parts = source.split("/")
    if source.startswith((".", "~", "/")) or len(parts) > 2 or not all(parts) or Path(parts[0]).is_dir():
        raise ValueError(
            f"there is no folder {source}; check the spelling, or give a hub id such as org/name."
        )
    _check_hub(source)


def _check_hub(source: str) -> None:
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        cached = any(
            isinstance(try_to_load_from_cache(source, name), str) for name in ("config.json", ADAPTER)
        )
        HfApi().model_info(source, timeout=HUB_SECONDS)
    except HFValidationError:
        raise ValueError(
            f"{source!r} is neither a folder nor a hub id such as org/name; check the spelling."
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise ValueError(
            f"the hub has no model {source} that you may read (status {status}), and there is no such folder; "
            "check the spelling, or log in with: hf auth login"
        ) from None
    except Exception as error:  # noqa: BLE001 - out of reach: each version of the client has its own classes for that
        if not cached:
            raise ValueError(
                f"there is no folder {source}, it is not in the hub's cache, and the hub cannot be reached "
                f"({type(error).__name__}); check the spelling or the connection."
            ) from None
        constants.HF_HUB_OFFLINE = True  # or transformers would ask again, file by file


def _is_adapter(source: str) -> bool:
    return (Path(source) / ADAPTER).exists()


_FAILURES = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, UserWarning)


@contextlib.contextmanager
def _one_sentence(source: str) -> Iterator[None]:
    """Turn whatever reading a foreign folder raises into one ValueError that names the folder."""
    from safetensors import SafetensorError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of libraries, about each other
            # Adapter weights that are not there would be left at random.
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            yield
    except (*_FAILURES, SafetensorError) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        if isinstance(e, ValueError) and source in reason:
            raise
        raise ValueError(f"{source} cannot be loaded: {reason[:300]}") from e
