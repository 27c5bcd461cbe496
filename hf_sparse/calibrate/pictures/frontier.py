"""Quality against cost: the choices on the way from the cheapest one to dense, and each candidate everywhere."""

from __future__ import annotations

from typing import Any

from ...evaluate.plot import LEAST_SPAN, new_figure, png, scale_loss, short
from ..costs import MEASURES
from ..table import VALUE_NAMES, titles

_TICKS = (0.1, 0.2, 0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 70, 100, 150, 200)  # % of dense
_CLOSE = 1.6  # costs that differ by a smaller factor get more ticks
_MARKERS = "osD^vPXp<>"
_COLOURS = ("C1", "C2", "C4", "C5", "C6", "C7", "C8", "C9")  # of the candidates


def frontier(figures: dict[str, Any]) -> bytes:
    """Return a PNG of cost (% of dense) against nats per token above dense, measured on the calibration text.

    Args:
        figures: the content of calibration.json.
    Raises:
        ValueError: matplotlib is missing.
    """
    dense = figures["uniform"][0]
    names = titles(figures["config"]["candidates"])
    columns = 2 if max(map(len, names)) <= 36 else 1
    figure = new_figure(8, 4.6 + 0.2 * (len(names) + 2) / columns, layout="constrained")
    axes = figure.subplots()

    def place(point: dict[str, Any]) -> tuple[float, float]:
        return 100 * point["cost"], point["value"] - dense["value"]

    way = [place(point) for point in figures["frontier"]]
    axes.plot(*zip(*way, strict=True), "-o", color="C0", markersize=4, zorder=3, label="calibrated")
    alone = [place(point) for point in figures["uniform"][1:]]
    for number, (name, at) in enumerate(zip(names[1:], alone, strict=True)):
        colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
        axes.plot(*at, marker, color=colour, markersize=7, zorder=4, label=f"{short(name)} everywhere")
    axes.plot(*place(dense), "*", color="0.2", markersize=14, zorder=5, label="dense")
    chosen = place(figures["chosen"])
    axes.plot(*chosen, "o", color="C3", markersize=13, fillstyle="none", markeredgewidth=2, zorder=6)
    lost = f"{chosen[1]:+.4f} at {chosen[0]:.1f} %"
    axes.annotate(f"chosen: {lost}", chosen, (12, 10), textcoords="offset points", color="C3", fontsize=9)
    axes.axvline(100 * figures["budget"], color="C3", linestyle=":", linewidth=1, label="budget")
    axes.axhline(0, color="0.45", linewidth=0.8)
    places = [*way, *alone, (100.0, 0.0)]
    _scale_cost(axes, [x for x, _ in places])
    heights = [y for _, y in places]
    scale_loss(axes, 1.4 * min(-LEAST_SPAN, *heights), 1.4 * max(2 * LEAST_SPAN, *heights))
    cost = figures["cost"]
    axes.set(
        xlabel=f"% of dense {MEASURES[cost['of']]}, {cost['tokens']:,} tokens ({cost['of']})",
        ylabel=f"{VALUE_NAMES[figures['config']['objective']]} above dense",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize="small", ncols=columns)
    return png(figure)


def _scale_cost(axes: Any, costs: list[float]) -> None:
    """Mark round shares of dense that lie among the costs."""
    low, high = min(costs) / 1.15, max(costs) * 1.25
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    if high / low < _CLOSE:
        axes.set_xscale("linear")
        return
    shown = [tick for tick in _TICKS if low <= tick <= high]
    axes.set_xticks(shown, [f"{tick:g} %" for tick in shown])
    axes.set_xticks([], minor=True)
