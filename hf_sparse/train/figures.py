"""What was measured of an adapter on held-out texts, as its model card shows it: a table and metadata."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping

from huggingface_hub import EvalResult

from .config import AdaptationArguments

_ROWS = {  # as PerplexityCallback names them
    "base_dense": "base model, dense attention",
    "base_sparse": "base model, this pattern, not trained for it",
    "sparse": "with this adapter, this pattern",
    "dense": "with this adapter, dense attention (not what it was trained for)",
}


def nats_per_token(figures: Mapping[str, float]) -> dict[str, float]:
    """Return nats per token by the name of what was measured, out of a log of `PerplexityCallback`."""
    keys = {name: f"eval_{name}_nats_per_token" for name in _ROWS}
    return {name: figures[key] for name, key in keys.items() if key in figures}


def perplexity_section(nats: Mapping[str, float], arguments: AdaptationArguments, texts: str) -> list[str]:
    """Return the part of a card with the table of what was measured on the `texts`, or the command that does it."""
    if not nats:
        command = shlex.join(["hf-sparse", "eval", "FOLDER", "--length", str(arguments.length)])
        return [
            "## Perplexity",
            f"Nothing was measured. `{command}` does, dense and sparse, with the adapter and without.",
        ]
    rows = []
    for name, value in nats.items():
        above = f"{value - nats['base_dense']:+.4f}" if "base_dense" in nats else ""
        rows.append(f"| {_ROWS[name]} | {_perplexity(value):.3f} | {value:.4f} | {above} |")
    length = arguments.eval_length or arguments.length
    return [
        "## Perplexity",
        f"Of {texts}, up to {length:,} tokens of each, in the precision of the training:",
        "\n".join(["| | perplexity | nats/token | above dense |", "|---|---|---|---|", *rows]),
    ]


def results(nats: Mapping[str, float], task: str | None, texts: str) -> list[EvalResult]:
    """Return the perplexities of the `texts` for the metadata of a card."""
    return [
        EvalResult(
            task_type=task or "text-generation",
            dataset_type="text",
            dataset_name=texts.replace("`", ""),
            metric_type="perplexity",
            metric_name=f"perplexity {_ROWS[name]}",
            metric_value=round(_perplexity(value), 4),
        )
        for name, value in nats.items()
    ]


def _perplexity(nats: float) -> float:
    return math.inf if nats >= 700 else math.exp(nats)
