"""Tokens per second of a whole model reading a prompt, dense and patched, beside the ceiling that Amdahl's law sets."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_sparse import Pattern, patched
from hf_sparse.evaluate.speed import Prefill, measure_prefill

from .cases import Case
from .limits import TILE, limits
from .operators import DENSE, key_of
from .suite import Suite, Unit
from .timing import Deadline, Failure, attempt

# Random weights: only the shape matters. The second is the shape of a Llama of a billion parameters.
MODELS = {
    "cpu": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "vocab_size": 8192}
    | {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64},
    "cuda": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
}
REPEATS = 3


def make_model(suite: Suite, length: int) -> Any:
    """Return a Llama with random weights that reads `length` tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        **MODELS[suite.kind],
        "max_position_embeddings": length,
        "attn_implementation": "sdpa",
    }
    config = LlamaConfig(**settings)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(suite.shape.dtype)
    try:
        with suite.shape.device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def measure(unit: Unit, suite: Suite, deadline: Deadline) -> list[dict[str, Any]]:
    """Return rows of tokens per second, dense and with each pattern in every layer.

    Raises:
        OutOfTime: the deadline passed.
    """
    deadline.check()
    model = make_model(suite, unit.length)
    config = model.config
    key = key_of(unit, suite) | {
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "layers": config.num_hidden_layers,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    rows, patterns = [], {}
    for case in unit.cases:
        pattern = attempt(partial(_tried, model, case, unit.length, suite.backends[0]))
        if isinstance(pattern, Failure):
            rows.append(key | {"pattern": case.label, "method": "hf_sparse", "error": pattern.reason})
        else:
            patterns[case.label] = pattern
    deadline.check()
    found = measure_prefill(
        model,
        (None, *patterns.values()),
        (unit.length,),
        repeats=min(REPEATS, suite.repeats),
        backend=suite.backends[0],
    )
    dense = found[0]
    share = min(
        1.0, config.num_hidden_layers * _attention_seconds(suite, config, unit.length) / dense.seconds
    )
    rows.append(
        key | {"pattern": DENSE, "method": "dense SDPA", "attention_share": _rounded(share)} | _speed(dense)
    )
    for (label, pattern), one in zip(patterns.items(), found[1:], strict=True):
        limit = limits(pattern, unit.length, config.num_attention_heads, True, TILE[suite.kind]).pairs
        row: dict[str, Any] = {
            "ratio": _rounded(dense.seconds / one.seconds),
            "pairs_limit": _rounded(1 / (1 - share + share / limit)),
            "ceiling": _rounded(1 / (1 - share)) if share < 1 else None,
        }
        row["of_pairs_limit"] = _rounded(row["ratio"] / row["pairs_limit"])
        rows.append(key | {"pattern": label, "method": "hf_sparse"} | _speed(one) | row)
    return rows


def _tried(model: Any, case: Case, length: int, backend: str) -> Pattern:
    """Return the case's pattern after it ran once on a few tokens of the patched model."""
    pattern = case.pattern(length)
    ids = torch.arange(64, device=model.device)[None]
    with torch.inference_mode(), patched(model, pattern, backend=backend):
        model(input_ids=ids, logits_to_keep=1)
    return pattern


def _attention_seconds(suite: Suite, config: Any, length: int) -> float:
    """Return the seconds of one layer's dense attention, the fastest of three calls."""
    device, gqa = suite.shape.device, config.num_attention_heads != config.num_key_value_heads
    q, k, v = (
        torch.randn(1, heads, length, config.head_dim, device=device, dtype=suite.shape.dtype)
        for heads in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    )
    fastest = math.inf
    for _ in range(3):
        _wait(device)
        started = time.perf_counter()
        scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        _wait(device)
        fastest = min(fastest, time.perf_counter() - started)
    return fastest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _speed(one: Prefill) -> dict[str, Any]:
    return {
        "ms": _rounded(one.seconds * 1e3),
        "tokens_per_second": _rounded(one.tokens_per_second),
        "workspace_bytes": one.workspace,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
