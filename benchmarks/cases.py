"""The patterns of the suite, by label, and patterns a person writes on the command line."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import Any

from hf_sparse import Pattern, get_pattern

GLOBALS = tuple(range(64))


@dataclass(frozen=True)
class Case:
    """One row of the tables.

    label: how the tables and `--patterns` call it.
    name, options: the registered pattern and its options.
    causal: False for the encoders' form, which transformers' Longformer and BigBird compute.
    """

    label: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    causal: bool = True

    def pattern(self, length: int) -> Pattern:
        """Return the pattern, what adapts to the length fixed for `length` tokens."""
        return get_pattern(self.name, **self.options).resolve(length)


CASES = (
    Case("window-512", "sliding_window", {"window": 512}),
    Case("streaming-4+508", "streaming_llm", {"sinks": 4, "window": 508}),
    Case("longformer-512+64", "longformer", {"window": 512, "global_tokens": GLOBALS}),
    Case("sparse-strided-128", "sparse_transformer_strided", {"stride": 128}),
    Case("sparse-fixed-128/8", "sparse_transformer_fixed", {"block": 128, "summary": 8}),
    Case("bigbird-64", "bigbird", {"block": 64}),
    Case("dilated-512x4", "dilated_window", {"window": 512, "dilation": 4}),
    Case("window-1024", "sliding_window", {"window": 1024}),
    Case("streaming-4+1020", "streaming_llm", {"sinks": 4, "window": 1020}),
    Case("block-128+3", "block_local", {"block": 128, "neighbours": 3}),
    Case("window-128", "sliding_window", {"window": 128}),
    Case("block-256+1", "block_local", {"block": 256, "neighbours": 1}),
    Case("global-64", "global_tokens", {"positions": GLOBALS}),
    Case("random-64", "random", {"keys_per_query": 64}),
    Case("strided-64", "strided", {"stride": 64}),
    Case("atrous-64", "atrous", {"stride": 64}),
    Case("atrous-local-64", "atrous_local", {"stride": 64}),
    Case("grouped-heads", "grouped_heads"),
    Case("multi-scale-128x4", "multi_scale", {"window": 128, "scales": 4}),
    Case("shifted-512", "shifted", {"group": 512}),
    # As encoders use them: transformers' Longformer with attention_window 512, its BigBird with blocks of 64.
    Case(
        "longformer-257+64-both-sides", "longformer", {"window": 257, "global_tokens": GLOBALS}, causal=False
    ),
    Case("bigbird-64-both-sides", "bigbird", {"block": 64}, causal=False),
)
LABELS = tuple(case.label for case in CASES)


def find_cases(wanted: list[str], main: set[str]) -> list[Case]:
    """Return the cases that the words of `--patterns` name, each once.

    Args:
        wanted: labels, "all", "main", or a registered pattern with options such as ``sliding_window(window=96)``.
        main: the labels that "main" stands for.
    Raises:
        ValueError: a word that is none of these.
    """
    found: dict[str, Case] = {}
    for word in wanted:
        if word in ("all", "main"):
            some = [case for case in CASES if word == "all" or case.label in main]
        else:
            some = [case for case in CASES if case.label == word] or [_written(word)]
        found |= {case.label: case for case in some}
    return list(found.values())


def _written(text: str) -> Case:
    """Return the case of ``name`` or ``name(option=value, ...)``."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
        if not isinstance(call.func, ast.Name) or call.args or not all(k.arg for k in call.keywords):
            raise ValueError(text)
        options = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(
            f"{text!r} is no pattern of the suite; write name(option=value) or one of: all, main, {', '.join(LABELS)}"
        ) from None
    case = Case(text.replace(" ", ""), call.func.id, options)
    case.pattern(1024)  # unknown names and options are refused before anything runs
    return case
