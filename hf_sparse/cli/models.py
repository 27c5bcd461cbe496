"""Loading what the user names: a hub id, a local model, or an adapter folder; every failure one sentence."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import warnings
from typing import Any

from .spelling import check_stored

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
CONTROL = "control"  # what peft calls the second adapter


def add_model_arguments(parser: argparse.ArgumentParser, control: bool = True) -> None:
    """Give the parser what `load_model` reads, where `control` is set with an adapter to compare another one with."""
    parser.add_argument(
        "model", metavar="MODEL", help="hub id, model folder, or adapter folder (it knows its base)"
    )
    parser.add_argument("--adapter", metavar="FOLDER", help="peft adapter folder to put on MODEL")
    if control:
        parser.add_argument(
            "--control", metavar="FOLDER", help="adapter trained the same way on the dense model"
        )
    else:
        parser.set_defaults(control=None)
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

    from ..hf.extension import restore_extension
    from ..hf.loading import put_adapter, read_extension
    from ..hf.sources import ADAPTER_CONFIG, SIDECAR, check_source, is_adapter

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = _device(args.device)
    adapter, base = args.adapter, args.model
    for flag in ("adapter", "control"):
        folder = getattr(args, flag)
        if folder is not None and not is_adapter(folder):
            raise ValueError(f"--{flag} {folder} holds no {ADAPTER_CONFIG}; give a folder that peft saved.")
    if is_adapter(args.model):
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of libraries, about each other
        model, tokenizer = _load_patched(base, adapter, args)
        if adapter:
            model = put_adapter(model, adapter)
        if args.control:
            if os.path.exists(sidecar := os.path.join(args.control, SIDECAR)):
                restore_extension(model, read_extension(args.control), sidecar, extend=False)
            model = put_adapter(model, args.control, CONTROL)
    return model.to(device).eval(), tokenizer


def _base_of(adapter: str) -> str:
    """Return the base model that an adapter folder names."""
    from ..hf.loading import base_of, read_adapter_config
    from ..hf.sources import check_source

    config = read_adapter_config(adapter)
    try:
        base = base_of(adapter, config)
        check_source(base)
    except ValueError as error:
        raise ValueError(
            f"the base model of adapter {adapter} cannot be found ({str(error).rstrip('.')}); "
            f"name it with: hf-sparse eval BASE --adapter {adapter}"
        ) from None
    return base


def _load_patched(base: str, adapter: str | None, args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the base model, extended and patched as the adapter's was, or else the model itself, and its tokenizer."""
    from ..hf import load
    from ..hf.extension import restore_extension
    from ..hf.loading import (
        language_model_class,
        load_base,
        load_tokenizer,
        patch_as_saved,
        read_config,
        read_extension,
        read_sidecar,
        stored_settings,
    )
    from ..hf.sources import SIDECAR

    sidecar = os.path.join(adapter, SIDECAR) if adapter else None
    if adapter and not args.pattern and not os.path.exists(str(sidecar)):
        raise ValueError(
            f"adapter {adapter} has no {SIDECAR}, so its pattern is unknown; name one with --pattern."
        )
    saved = None
    if adapter and os.path.exists(str(sidecar)):
        _check_sidecar(str(sidecar))
        saved = read_sidecar(adapter)
    config = read_config(base, {})
    check_stored(getattr(config.get_text_config(), "sparse_attention", None), f"the config of {base}")
    dense = stored_settings(config, base) is None
    tokenizer = load_tokenizer(base)
    model = (
        load_base(base, language_model_class(config), dtype=args.dtype)
        if dense
        else load(base, dtype=args.dtype)
    )
    if saved is not None:
        restore_extension(model, read_extension(str(adapter)), str(sidecar))
        patch_as_saved(model, saved, str(sidecar))
    return model, tokenizer


def _check_sidecar(path: str) -> None:
    """Raise ValueError where the pattern saved with an adapter is unknown; `read_sidecar` says what else is wrong."""
    saved = None
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
        saved = json.load(file)
    check_stored(saved, path)


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
