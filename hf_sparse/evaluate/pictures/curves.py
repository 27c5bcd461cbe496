"""Curves of all runs: the loss itself above, and what each sparse run loses to dense below."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..plot import FARTHEST, LEAST_SPAN, new_figure, png, scale_loss, short, styles

_LEGEND_ROW = 0.19  # inches
_TWO_COLUMNS = 60  # characters of a title up to which the legend has two columns
_CROWDED = 6  # more curves than this are told apart on a logarithmic scale


@dataclass(frozen=True)
class Point:
    """What one run reached at `x`: nats per token over `tokens`, and how much that is above dense.

    nats, above: as in results.json, where null is not a number; above is {"estimate", "low", "high"}, None for dense.
    """

    x: float
    tokens: int
    nats: float | None
    above: dict[str, Any] | None


@dataclass(frozen=True)
class Curve:
    """One run: its title, whether it is sparse, and its points."""

    title: str
    sparse: bool
    points: list[Point]

    @property
    def nats_per_token(self) -> float:
        """Over all points; inf where one is not a number."""
        if any(point.nats is None for point in self.points):
            return math.inf
        total = sum(point.nats * point.tokens for point in self.points if point.nats is not None)
        return total / sum(point.tokens for point in self.points)


def draw_curves(
    curves: list[Curve], value: Callable[[float], float], above_title: str, x_title: str, trained: int | None
) -> bytes:
    """Return a PNG of two panels over the same x, in powers of 2.

    The band below is the 95 % interval; points without one get none. Runs that lost more than FARTHEST are named in the
    legend only.

    Args:
        value: of the upper panel, from nats per token.
        above_title: says what `value` is.
        trained: tokens the model was trained on, marked where the curves go beyond.
    """
    columns = 2 if len(curves) > 4 and max(len(c.title) for c in curves) <= _TWO_COLUMNS else 1
    height = 7 + _LEGEND_ROW * math.ceil((len(curves) + 1) / columns)
    figure = new_figure(8.5, height, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    band = 0.2 if len(curves) <= _CROWDED else 0.06  # opacity
    best = min(curve.nats_per_token for curve in curves)
    for curve, style in zip(curves, styles([curve.sparse for curve in curves]), strict=True):
        if not (excess := curve.nats_per_token - best) <= FARTHEST:
            where = f"{excess:.1f} nats above" if math.isfinite(excess) else "not a number"
            name = f"{short(curve.title)}: off the scale, {where}"
            above.plot([], [], label=name, **style)
            continue
        x = [point.x for point in curve.points]
        above.plot(
            x,
            [value(point.nats) for point in curve.points if point.nats is not None],
            label=short(curve.title),
            **style,
        )
        lost = [point.above for point in curve.points if point.above is not None]
        if lost:
            below.plot(x, _numbers(lost, "estimate"), **style)
            low, high = _numbers(lost, "low"), _numbers(lost, "high")
            below.fill_between(x, low, high, color=style["color"], alpha=band, linewidth=0)
    below.axhline(0, color="gray", linewidth=0.8)
    if trained and trained < max(point.x for curve in curves for point in curve.points):
        name = f"trained on {trained:,} tokens: extrapolation beyond"
        above.axvline(trained, color="gray", linestyle=":", label=name)
        below.axvline(trained, color="gray", linestyle=":")
    above.set(ylabel=above_title)
    below.set(xlabel=x_title, ylabel="nats/token above dense, 95 % interval")
    below.set_xscale("log", base=2)
    below.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    low_end, high_end = (1.1 * end for end in below.dataLim.intervaly)
    low_end, high_end = min(low_end, -LEAST_SPAN), max(high_end, LEAST_SPAN)
    if len(curves) > _CROWDED:
        scale_loss(below, low_end, high_end)
    else:
        below.set_ylim(low_end, high_end)
    figure.legend(loc="outside lower center", fontsize="small", ncols=columns)
    above.grid(alpha=0.3)
    below.grid(alpha=0.3)
    return png(figure)


def _numbers(lost: list[dict[str, Any]], key: str) -> list[float]:
    return [math.nan if each[key] is None else each[key] for each in lost]
