"""The loss by position: what a window forgets shows where dense attention goes on learning from the text."""

from __future__ import annotations

from typing import Any

from .curves import Curve, Point, draw_curves


def loss_by_position(figures: dict[str, Any]) -> bytes:
    """Return a PNG: nats per token by the number of tokens before, and what each sparse run loses to dense.

    Args:
        figures: the content of results.json.
    Raises:
        ValueError: matplotlib is missing.
    """
    curves = [
        Curve(run["title"], run["pattern"] is not None, _points(run["loss_by_position"]))
        for run in figures["runs"]
    ]
    return draw_curves(
        curves,
        lambda nats: nats,
        "nats/token, by position",
        "tokens before the scored token",
        figures["config"]["trained_length"],
    )


def _points(buckets: list[dict[str, Any]]) -> list[Point]:
    return [
        # the middle of the bucket on a scale of powers of 2
        Point(
            bucket["tokens_before"][0] * 2**0.5,
            bucket["tokens"],
            bucket["nats_per_token"],
            bucket["above_dense"],
        )
        for bucket in buckets
        if bucket["tokens"]
    ]
