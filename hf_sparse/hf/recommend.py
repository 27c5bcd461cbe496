"""A pattern to start from, by what the text is, how long it is and how large the model is."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..patterns import Pattern
from ..patterns.checks import check_choice, check_count
from ..patterns.full import Full
from ..patterns.grouped_heads import GroupedHeads
from ..patterns.longformer import Longformer
from ..patterns.sliding_window import SlidingWindow
from ..patterns.sparse_transformer_fixed import SparseTransformerFixed
from ..patterns.streaming_llm import StreamingLLM
from .active import unwrap
from .stored_settings import layer_count, query_heads

SCENARIOS = ("documents", "dialogue", "code", "long", "exact", "grouped")
SHORT = 512  # tokens up to which documents and code are left dense: there is next to nothing to save
LONG = 2**16  # tokens from which documents and code need more than a window
# Parameters below which a model counts as small or medium, and the widest window of each size, in tokens.
SMALL, MEDIUM = 10**9, 10**10
_WINDOWS = {"small": 128, "medium": 256, "large": 512}


def recommended(seq_len: int, model: nn.Module | None = None, scenario: str = "documents") -> Pattern:
    """Return a pattern for sequences of `seq_len` tokens that fits `model`: a table, not a measurement.

    - "documents": `Longformer`; "code": `SlidingWindow`. Up to SHORT tokens both are `Full`: dense attention is exact
      and as fast. From LONG tokens on both are what "long" is.
    - "dialogue" without end: `StreamingLLM` with 4 sinks, at any length.
    - "long": `SparseTransformerFixed`, in blocks of about the square root of the length (a power of two, at least 128
      tokens), a sixteenth of them summary. Fixed rather than strided: the paper prefers it for text, which has no
      period, and a cache can drop every key that is no summary, while each key of a stride has readers to come.
    - "exact", a task that needs every pair of tokens: `Full`, dense attention.
    - "grouped": `GroupedHeads`. Below 512 tokens a window of 64 and 4 local to 2 global heads, up to 2048 a window of
      128 and 8 to 4, above a window of 256 or what follows and 12 to 4; in these proportions where a model is given.

    The window is a quarter of the length, at most 128 tokens for a small model (below a billion parameters), 256 for a
    medium one (below ten billion) and 512 for a large one or where no model is given.

    Raises:
        ValueError: an unknown scenario, no length, or a model whose config does not tell its heads and layers.
    """
    check_count("seq_len", seq_len, 1)
    check_choice("scenario", scenario, SCENARIOS)
    heads = layers = None
    if model is not None:
        heads, layers = _heads_and_layers(model)
    pattern = _choose(seq_len, _size(model), heads, scenario)
    if heads is not None and layers is not None:
        pattern.check_fit(heads, layers)
    return pattern


def _choose(seq_len: int, size: str, heads: int | None, scenario: str) -> Pattern:
    window = max(1, min(_WINDOWS[size], seq_len // 4))
    if scenario == "dialogue":
        return StreamingLLM(sinks=4, window=window)
    if scenario == "grouped":
        return _grouped(seq_len, window, heads)
    if scenario == "exact" or (scenario != "long" and seq_len <= SHORT):
        return Full()
    if scenario == "long" or seq_len >= LONG:
        block = max(128, 2 ** round(math.log2(math.sqrt(seq_len))))
        return SparseTransformerFixed(block=block, summary=block // 16)
    return Longformer(window=window) if scenario == "documents" else SlidingWindow(window)


def _grouped(seq_len: int, window: int, heads: int | None) -> Pattern:
    if seq_len < 512:
        window, local, distant = 64, 4, 2
    elif seq_len <= 2048:
        window, local, distant = 128, 8, 4
    else:
        window, local, distant = max(256, window), 12, 4
    if heads is not None:
        # Where there are two heads or more, each group keeps at least one.
        local = min(max(round(heads * local / (local + distant)), 1), max(heads - 1, 1))
        distant = heads - local
    return GroupedHeads(local_heads=local, global_heads=distant, window=window, adaptive_window=False)


def _size(model: nn.Module | None) -> str:
    if model is None:
        return "large"
    parameters = unwrap(model).num_parameters()
    return "small" if parameters < SMALL else "medium" if parameters < MEDIUM else "large"


def _heads_and_layers(model: nn.Module) -> tuple[int, int]:
    config: Any = getattr(unwrap(model), "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    counts = query_heads(text), layer_count(text)
    if not all(counts):
        raise ValueError(
            f"recommended needs a transformers model whose config tells its heads and layers, got "
            f"{type(model).__name__} with {counts[0]} and {counts[1]}; leave model out"
        )
    return counts
