"""The model that is adapted: loaded, made longer where that is asked for, patched, with LoRA on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..evaluate.head import is_masked
from ..hf import patch_model
from ..hf.added_weights import read_added_weights
from ..hf.describe import is_causal
from ..hf.extension import extend_positions, readable_tokens
from ..hf.loading import language_model_class, load_base, load_tokenizer, read_config
from ..hf.sources import check_source, is_adapter
from ..hf.stored_settings import SparseSettings
from ..selectors import refuse_looking_ahead
from .config.model import ModelArguments


def load_patched(arguments: ModelArguments, length: int) -> tuple[Any, Any]:
    """Return the base model under its pattern, on the CPU and in the dtype asked for, and its tokenizer.

    Args:
        length: tokens of a sample, which the model must be able to read.
    Raises:
        ValueError: an adapter, an encoder-decoder, a model that cannot be loaded, read so many tokens, or run the
            pattern.
    """
    name = arguments.model
    if is_adapter(name):
        raise ValueError(f"model={name} is an adapter; name the model it was trained on, or merge it first.")
    check_source(name)
    if Path(name).is_dir():
        name = str(Path(name).resolve())  # the adapter remembers it, and must find it from any folder
    config = read_config(name, {})  # where it is broken, the tokenizer would be blamed
    if config.is_encoder_decoder:
        raise ValueError(
            f"model={arguments.model} is an encoder-decoder ({config.model_type}), which this objective does not "
            "train; give a causal language model, or an encoder with a head for masked words."
        )
    chosen = arguments.chosen_pattern()
    pattern = chosen.pattern if isinstance(chosen, SparseSettings) else chosen
    refuse_looking_ahead(pattern, "not for training")
    tokenizer = load_tokenizer(name)
    model = load_base(name, language_model_class(config), dtype=getattr(torch, arguments.dtype))
    if not is_causal(model) and not is_masked(model):
        raise ValueError(
            f"model={arguments.model} is an encoder: {type(model).__name__} lets a token see the ones it is trained "
            "to predict; save it as a masked language model, or give a causal one."
        )
    _make_long(model, arguments, length)
    patch_model(
        model,
        chosen,
        backend=arguments.backend,
        layers=arguments.layers,
        seq_len=length,
        learned_sinks=arguments.learned_sinks and not arguments.dense_control,
    )
    read_added_weights(model, name, required=False)
    model.config.use_cache = False
    return model, tokenizer


def _make_long(model: Any, arguments: ModelArguments, length: int) -> None:
    """Make the model read samples of `length` tokens, or raise ValueError."""
    trained = readable_tokens(model)
    if trained is None or length <= trained:
        if arguments.extend_positions is not None:
            raise ValueError(
                f"extend_positions={arguments.extend_positions} has nothing to do: {type(model).__name__} reads "
                f"{trained or 'any number of'} tokens and length={length}; leave it out."
            )
        return
    if arguments.extend_positions is None:
        raise ValueError(
            f"length={length} is beyond the {trained} positions of {type(model).__name__}; use length={trained} or "
            "less, or choose how it reads more with extend_positions."
        )
    extend_positions(model, length, arguments.extend_positions)
