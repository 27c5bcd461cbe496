"""Tiny random models of every supported architecture, and the dense oracle they are compared with."""

from __future__ import annotations

import copy
import functools

import torch
import transformers
from torch import Tensor

import hf_sparse
from hf_sparse.plan import Constraint

VOCAB = 64
_COMMON = {"vocab_size": VOCAB, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": None}
_ROPE = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_BERT = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
}
_HYBRID = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
_SPECIFICATIONS = {
    "llama": ("LlamaForCausalLM", _ROPE),
    "qwen2": ("Qwen2ForCausalLM", _ROPE),
    "qwen3": ("Qwen3ForCausalLM", {**_ROPE, "head_dim": 8}),
    "mistral": ("MistralForCausalLM", {**_ROPE, "sliding_window": 9}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {**_ROPE, **_HYBRID, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": ("Gemma3ForCausalLM", {**_ROPE, **_HYBRID, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3ForCausalLM", {**_ROPE, "sliding_window": None}),
    "gpt2": ("GPT2LMHeadModel", {**_COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("GPTNeoXForCausalLM", {k: v for k, v in _ROPE.items() if k != "num_key_value_heads"}),
    "opt": ("OPTForCausalLM", {**_BERT, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "bert": ("BertForMaskedLM", _BERT),
    "roberta": ("RobertaForMaskedLM", _BERT),
    "modernbert": (
        "ModernBertForMaskedLM",
        {
            **_BERT,
            "local_attention": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "cls_token_id": 2,
            "sep_token_id": 3,
        },
    ),
}
ALL = list(_SPECIFICATIONS)
ENCODERS = ["bert", "roberta", "modernbert"]
DECODERS = [name for name in ALL if name not in ENCODERS]


def random_model(class_name: str, options: dict, seed: int = 0) -> torch.nn.Module:
    """Return a model of random weights, in evaluation mode."""
    model_class = getattr(transformers, class_name)
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**options))
    with torch.no_grad():  # the default 0.02 makes attention nearly uniform: patterns would hardly show
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.25)
    return model.eval()


@functools.cache
def _build(name: str) -> torch.nn.Module:
    return random_model(*_SPECIFICATIONS[name], seed=len(name))


def tiny(name: str, implementation: str | None = None) -> torch.nn.Module:
    """Return a fresh copy of the tiny model, in evaluation mode."""
    model = copy.deepcopy(_build(name))
    if implementation is not None:
        model.set_attn_implementation(implementation)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Return random token ids [B, N] without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB, (batch, length), generator=generator)


def native_constraint(name: str, kind: str) -> Constraint:
    """Return what the architecture itself imposes on a layer of this kind, written down by hand."""
    causal = name in DECODERS
    window = {"mistral": 9, "gemma2": 9, "gemma3": 9, "modernbert": 5}.get(name)
    return Constraint(causal, window if name == "mistral" or kind == "sliding_attention" else None)


def oracle_logits(name: str, pattern, ids: Tensor) -> Tensor:
    """Return the logits of the eager model under an explicit additive mask: the pattern and the model's own."""
    model = tiny(name, "eager")
    n = ids.shape[1]
    query, key = torch.arange(n)[:, None], torch.arange(n)[None]

    def additive(kind: str) -> Tensor:
        constraint = native_constraint(name, kind)
        allowed = pattern.mask(n, n, causal=constraint.causal)[0]
        if constraint.window is not None:
            allowed = allowed & ((query - key).abs() < constraint.window)
        bias = torch.zeros(n, n).masked_fill(~allowed, torch.finfo(torch.float32).min)
        return bias.expand(len(ids), 1, n, n)

    mixed = len(set(getattr(model.config, "layer_types", None) or [])) > 1
    mask = {k: additive(k) for k in model.config.layer_types} if mixed else additive("full_attention")
    extra = {"position_ids": torch.arange(n)[None]} if name == "opt" else {}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **extra).logits


def logits(model: torch.nn.Module, ids: Tensor, **kwargs) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


PLACES = ((5,), (2, 9), ())  # global positions of three rows
LENGTHS = (20, 14, 17)  # and their tokens


def longformer(name: str, **options) -> torch.nn.Module:
    """Return the tiny model under a narrow longformer without globals of its own."""
    return hf_sparse.patch_model(tiny(name), "longformer", **{"window": 3, "global_tokens": (), **options})


def rows_with_globals(side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, padding mask and global mask [3, 20] of three rows, padded on that side."""
    ids = torch.full((3, max(LENGTHS)), 1)
    mask, chosen = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        start = max(LENGTHS) - length if side == "left" else 0
        ids[row, start : start + length] = tokens(1, length, seed=row)[0]
        mask[row, start : start + length] = 1
        chosen[row, [start + place for place in PLACES[row]]] = 1
    return ids, mask, chosen
