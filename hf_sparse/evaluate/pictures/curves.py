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
    """Return a PNG of two panels over the same x, in powers of 2; of the upper one where nothing is held against dense.

    The band below is the 95 % interval; points without one get none. Runs that lost more than FARTHEST are named in the
    legend only.

    Args:
        value: of the upper panel, from nats per token.
        above_title: says what `value` is.
        trained: tokens the model was trained on, marked where the curves go beyond.
    """
    columns = 2 if len(curves) > 4 and max(len(c.title) for c in curves) <= _TWO_COLUMNS else 1
    compared = any(point.above is not None for curve in curves for point in curve.points)
    height = (7 if compared else 4) + _LEGEND_ROW * math.ceil((len(curves) + 1) / columns)
    figure = new_figure(8.5, height, layout="constrained")
    panels = figure.subplots(1 + compared, 1, sharex=True, squeeze=False)[:, 0]
    best = min(curve.nats_per_token for curve in curves)
    shown = []
    for curve, style in zip(curves, styles([curve.sparse for curve in curves]), strict=True):
        if (excess := curve.nats_per_token - best) <= FARTHEST:
            shown.append((curve, style))
            x = [point.x for point in curve.points]
            y = [value(point.nats) for point in curve.points if point.nats is not None]
            panels[0].plot(x, y, label=short(curve.title), **style)
        else:
            where = f"{excess:.1f} nats above" if math.isfinite(excess) else "not a number"
            panels[0].plot([], [], label=f"{short(curve.title)}: off the scale, {where}", **style)
    panels[0].set(ylabel=above_title)
    if compared:
        _draw_lost(panels[1], shown, crowded=len(curves) > _CROWDED)
    if trained and trained < max(point.x for curve in curves for point in curve.points):
        name = f"trained on {trained:,} tokens: extrapolation beyond"
        for panel in panels:
            label = name if panel is panels[0] else None
            panel.axvline(trained, color="gray", linestyle=":", label=label)
    panels[-1].set(xlabel=x_title)
    panels[-1].set_xscale("log", base=2)
    panels[-1].xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    figure.legend(loc="outside lower center", fontsize="small", ncols=columns)
    for panel in panels:
        panel.grid(alpha=0.3)
    return png(figure)


def _draw_lost(axes: Any, shown: list[tuple[Curve, dict[str, Any]]], crowded: bool) -> None:
    """Draw what each sparse run loses to dense, with its interval."""
    for curve, style in shown:
        lost = [point.above for point in curve.points if point.above is not None]
        if lost:
            x = [point.x for point in curve.points]
            axes.plot(x, _numbers(lost, "estimate"), **style)
            low, high = _numbers(lost, "low"), _numbers(lost, "high")
            opacity = 0.06 if crowded else 0.2
            axes.fill_between(x, low, high, color=style["color"], alpha=opacity, linewidth=0)
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set(ylabel="nats/token above dense, 95 % interval")
    low_end, high_end = (1.1 * end for end in axes.dataLim.intervaly)
    low_end, high_end = min(low_end, -LEAST_SPAN), max(high_end, LEAST_SPAN)
    if crowded:
        scale_loss(axes, low_end, high_end)
    else:
        axes.set_ylim(low_end, high_end)


def _numbers(lost: list[dict[str, Any]], key: str) -> list[float]:
    return [math.nan if each[key] is None else each[key] for each in lost]
