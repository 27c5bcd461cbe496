"""Models and calls for the tests of caches: every pattern in small, every way to feed a text to a model."""

from __future__ import annotations

import copy
import functools

import torch
from rotary_models import ROTATED
from tiny_models import _COMMON, _ROPE, DECODERS, logits, random_model, tiny, tokens
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

import hf_sparse
from hf_sparse import PerHead, SlidingWindow, StreamingLLM, Strided, get_pattern

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
# Of each registered pattern options so small that 26 tokens are many.
OPTIONS = {
    "atrous": {"stride": 3},
    "atrous_local": {"stride": 3},
    "bigbird": {"block": 2, "window_blocks": 3, "global_blocks": 1, "random_blocks": 1},
    "block_local": {"block": 4, "neighbours": 1},
    "dilated_window": {"window": 3, "dilation": 2},
    "esa": {"keep": 0.4, "block": 3, "local": 0, "query_block": 2},
    "full": {},
    "global_tokens": {"positions": (0, 5), "ratio": 0.25},
    "grouped_heads": {"local_heads": 2, "window": 4, "global_token_ratio": 0.25, "adaptive_window": False},
    "gsa": {"keep": 5, "block": 4, "representatives": 2, "local": 0},
    "gsa_on_device": {"keep": 0.5, "block": 3, "dense_layers": 1, "bits": 5, "reuse": 2},
    "kvstar": {"keep": 5, "block": 4, "query_block": 3, "local": 0},
    "layered": {"pattern": SlidingWindow(window=4), "dense_every": 2},
    "longformer": {"window": 3, "global_tokens": (0, 7)},
    "lsh": {"rounds": 2, "block": 2, "buckets": 4, "local": 0},
    "multi_scale": {"window": 2, "scales": 3},
    "quest": {"keep": 4, "block": 2, "local": 1, "dense_layers": 1, "query_block": 4},
    "random": {"keys_per_query": 4},
    "rerope": {"window": 3, "pattern": StreamingLLM(sinks=2, window=6)},
    "self_extend": {"group": 2, "window": 3, "pattern": Strided(3, anchor="absolute") | SlidingWindow(6)},
    "shifted": {"group": 6},
    "sinks": {"sinks": 3},
    "sliding_window": {"window": 5},
    "sparse_transformer_fixed": {"block": 6, "summary": 2},
    "sparse_transformer_strided": {"stride": 4},
    "streaming_llm": {"sinks": 2, "window": 4},
    "strided": {"stride": 4, "anchor": "absolute"},
    "threshold": {"p": 0.6, "block": 2, "query_block": 2},
    "topk_blocks": {"keep": 0.5, "block": 3, "local": 0, "query_block": 2},
    "vertical_slash": {"vertical": 0.2, "slash": 0.3, "block": 2, "renew": 4, "local": 0},
}
MORE = [
    get_pattern("streaming_llm", sinks=2, window=4, positions="cache"),
    get_pattern("streaming_llm", sinks=0, window=4, positions="cache"),
    get_pattern("rerope", window=4),
    get_pattern("self_extend", window=4, group=3),
    PerHead((SlidingWindow(3), StreamingLLM(1, 4), Strided(4), Strided(4, anchor="absolute"))),
    get_pattern("topk_blocks", keep=5, block=2, query_block=1, reuse=2) | SlidingWindow(3),
    hf_sparse.PerLayer((SlidingWindow(3), StreamingLLM(sinks=1, window=4, positions="cache"))),
]
PATTERNS = [get_pattern(name, **options) for name, options in OPTIONS.items()] + MORE
_OTHERS = {
    "falcon_h1": ROTATED["falcon_h1"],
    "bart": (
        "BartForCausalLM",
        {
            **_COMMON,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 128,
        },
    ),
    "lfm2": (
        "Lfm2ForCausalLM",
        {**_ROPE, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    ),
}
NAMES = [*DECODERS, *_OTHERS]
HYBRIDS = ("falcon_h1", "lfm2")
PREFILLS = {"whole": (26,), "chunks": (7, 1, 11, 1, 1, 5), "tokens": (1,) * 26, "prompt": (14, *(1,) * 12)}


@functools.cache
def _other(name: str) -> torch.nn.Module:
    return random_model(*_OTHERS[name])


def decoder(name: str, pattern, **settings) -> torch.nn.Module:
    """Return a fresh patched decoder."""
    model = tiny(name) if name in DECODERS else copy.deepcopy(_other(name))
    return hf_sparse.patch_model(model, pattern, **settings)


def left_padded(pads=(0, 6), length: int = 17, seed: int = 0) -> dict[str, Tensor]:
    """Return random rows of which the first `pads` tokens are padding, and their mask."""
    ids = tokens(len(pads), length, seed)
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count], ids[row, :count] = 0, 1
    return {"input_ids": ids, "attention_mask": mask}


def caches(model: torch.nn.Module, slots: int = 64) -> dict[str, Cache]:
    """Return one empty cache of each kind that can serve the model: transformers' own hold no summaries of blocks."""
    config = model.config.get_text_config()
    if hf_sparse.hf.settings(model).pattern.content_based:
        return {"ours": hf_sparse.make_cache(model)}
    return {
        "ours": hf_sparse.make_cache(model),
        "dynamic": DynamicCache(config=config),
        "static": StaticCache(config=config, max_cache_len=slots),
    }


def fed(
    model: torch.nn.Module,
    ids: Tensor,
    cache: Cache,
    lengths,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Return the logits [B, N, V] of a text fed in calls of these lengths."""
    start, parts = 0, []
    for length in lengths:
        stop = start + length
        seen = {} if mask is None else {"attention_mask": mask[:, :stop]}
        if positions is not None:
            seen["position_ids"] = positions[:, start:stop]
        parts.append(logits(model, ids[:, start:stop], past_key_values=cache, use_cache=True, **seen))
        start = stop
    return torch.cat(parts, 1)
