"""The keyword arguments of attention: which of them leave its result as it is, and which cannot be honoured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GLOBALS = "global_attention_mask"
OWN_SINKS = "s_aux"  # the attention sinks [H] of a model that was trained with some, such as GPT-OSS
POSITIONS = "packed_position_ids"  # how a model that keeps its position ids to itself hands them on
# Keyword arguments that transformers hands through and that do not change what attention computes.
_HARMLESS_TENSORS = {
    POSITIONS,
    "cache_position",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "encoder_attention_mask",
    "encoder_hidden_states",
    "image_sizes",
    "input_ids",
    "inputs_embeds",
    "labels",
    "max_length_k",
    "max_length_q",
    "mm_token_type_ids",
    "num_items_in_batch",
    "position_ids",
    "shift_labels",
    "token_type_ids",
}
# What these carry is part of the scores or of the choice of keys, whatever its type.
_REFUSED = {
    "block_indices": "the model chooses its own keys",
    "cache": "continuous batching pages the keys",
    "head_mask": "weights are scaled per head",
    "indices": "the model chooses its own keys",
    "position_bias": "the model adds a position bias to the scores",
    OWN_SINKS: "the model has learned attention sinks",
    "sinks": "the model has learned attention sinks",
}


def refuse_arguments(module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for an argument that changes the result and that a pattern cannot honour."""
    for name, value in kwargs.items():
        if value is None:
            continue
        if name == GLOBALS:
            raise ValueError(
                f"{GLOBALS} is understood by a model that hf_sparse.patch_model or hf_sparse.load has prepared, "
                f"attn_implementation='sparse_...' alone does not; call patch_model"
            )
        if name in _REFUSED:
            raise ValueError(
                f"{type(module).__name__} passes {name!r} to attention ({_REFUSED[name]}), which sparse patterns "
                f"cannot honour; use the dense attention for this model"
            )
        if isinstance(value, Tensor) and name not in _HARMLESS_TENSORS:
            raise ValueError(
                f"{type(module).__name__} passes the tensor {name!r} to attention and sparse patterns do not know what "
                f"it means; leave it out or use the dense attention"
            )
