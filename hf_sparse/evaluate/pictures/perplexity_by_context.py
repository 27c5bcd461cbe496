"""Perplexity by context: the same tokens seen from more and more text before them."""

from __future__ import annotations

import math
from typing import Any

from .curves import Curve, Point, draw_curves


def perplexity_by_context(figures: dict[str, Any]) -> bytes:
    """Return a PNG: perplexity of the same tokens by the context they are seen from, and what each sparse run loses.

    Args:
        figures: the content of results.json.
    Raises:
        ValueError: matplotlib is missing, or no context curve was measured.
    """
    if not figures["config"]["contexts"]:
        raise ValueError("no context curve was measured; name its lengths with contexts (--contexts).")
    curves = [
        Curve(
            run["title"],
            run["pattern"] is not None,
            [
                Point(point["context"], point["tokens"], point["nats_per_token"], point["above_dense"])
                for point in run["loss_by_context"]
            ],
        )
        for run in figures["runs"]
    ]
    targets = figures["config"]["context_targets"]
    documents = curves[0].points[0].tokens // targets
    return draw_curves(
        curves,
        math.exp,
        f"perplexity of the last {targets:,} tokens",
        f"tokens of context they are seen from ({documents:,} documents)",
        figures["config"]["trained_length"],
    )
