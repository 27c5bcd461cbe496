"""Quality against speed: what each pattern costs and what it saves, in one picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..plot import FARTHEST, LEAST_SPAN, new_figure, png, scale_loss, short, styles

_LINE = 0.2  # inches from one label to the next
# inches: what is around the axes, the axes' width, and a character of a label
_LEFT, _BELOW, _ABOVE, _WIDTH, _CHARACTER = 0.9, 0.7, 0.3, 6.0, 0.062
# ticks by how many times the fastest run is as fast as the slowest one
_FINE = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3)
_MIDDLE = tuple(step * 10.0**power for power in range(-2, 3) for step in (1, 1.5, 2, 3, 5, 7))
_COARSE = tuple(step * 10.0**power for power in range(-3, 5) for step in (1, 2, 5))
_LEADER = {"arrowstyle": "-", "relpos": (0, 0.5), "linewidth": 0.6, "alpha": 0.7, "shrinkA": 2, "shrinkB": 0}


@dataclass(frozen=True)
class Place:
    """Where a run lies: how many times as fast as dense, and nats/token above dense; low and high may be unknown."""

    title: str
    speed: float
    lost: float
    low: float | None
    high: float | None
    style: dict[str, Any]

    @property
    def off(self) -> bool:
        return self.lost > FARTHEST

    @property
    def label(self) -> str:
        lost = f"{self.lost:+.3f}" if math.isfinite(self.lost) else "not a number"
        return f"{short(self.title)}   {lost}, {self.speed:.3g}x"


def quality_against_speed(figures: dict[str, Any]) -> bytes:
    """Return a PNG: every sparse run by its speed and its loss, both against the dense run it is held against.

    Speed is that of reading a prompt, where every run was timed doing it, else of scoring. Runs that lost more than
    FARTHEST lie at the upper edge; the label gives their loss.

    Args:
        figures: the content of results.json.
    Raises:
        ValueError: matplotlib is missing, or no sparse run was timed.
    """
    places, what = _places(figures)
    if not places:
        raise ValueError("there is no timed run with a pattern to hold against dense; measure a pattern too.")
    on = [place for place in places if not place.off]
    right = _CHARACTER * max(len(place.label) for place in places) + 0.6
    tall = max(3.8, _LINE * (len(places) + 1))
    width, height = _LEFT + _WIDTH + right, _BELOW + tall + _ABOVE
    figure = new_figure(width, height)
    axes = figure.add_axes((_LEFT / width, _BELOW / height, _WIDTH / width, tall / height))
    axes.set(xscale="log", xlabel=f"times as fast as dense, {what}", ylabel="nats/token above dense")
    low = min([-LEAST_SPAN, *(1.5 * (p.lost if p.low is None else p.low) for p in on)])
    high = max([2 * LEAST_SPAN, *(1.5 * (p.lost if p.high is None else p.high) for p in on)])
    if len(on) < len(places):
        high *= 1.5
    speeds = [1.0, *(place.speed for place in places)]
    slow, fast = min(speeds) / 1.15, max(speeds) * 1.15
    axes.set_xlim(slow, fast)
    scale_loss(axes, low, high)
    _scale_speed(axes, slow, fast)
    axes.grid(alpha=0.3)
    axes.axhline(0, color="0.45", linewidth=0.8)
    axes.axvline(1, color="0.45", linewidth=0.8)
    axes.plot([1], [0], marker="*", markersize=14, color="0.2", linestyle="none", zorder=3)
    axes.annotate("dense", (1, 0), (6, -12), textcoords="offset points", fontsize=8)
    for place in places:
        _draw(axes, place, high)
    _label(axes, places, high, _LINE / tall)
    return png(figure)


def _places(figures: dict[str, Any]) -> tuple[list[Place], str]:
    timing = figures["timing"]
    prefilled = all(each["prefill_seconds"] for each in timing.values())
    tokens = max((each["prefill_tokens"] or 0 for each in timing.values()), default=0)
    what = f"reading a prompt of {tokens:,} tokens" if prefilled else "scoring, output head included"
    runs = figures["runs"]
    found = []
    for run, style in zip(runs, styles([run["pattern"] is not None for run in runs]), strict=True):
        if run["pattern"] is None:
            continue
        own, dense = timing[run["title"]], timing[run["held_against"]]
        if prefilled:
            speed = dense["prefill_seconds"] / own["prefill_seconds"]
        elif own["tokens_per_second"] and dense["tokens_per_second"]:
            speed = own["tokens_per_second"] / dense["tokens_per_second"]
        else:
            continue
        lost = run["nats_above_dense"]
        estimate = math.inf if lost["estimate"] is None else lost["estimate"]
        found.append(Place(run["title"], speed, estimate, lost["low"], lost["high"], style))
    return found, what


def _draw(axes: Any, place: Place, top: float) -> None:
    colour = place.style["color"]
    if place.off:
        axes.plot([place.speed], [top], marker="^", markersize=9, color=colour, clip_on=False, zorder=4)
        return
    bars = None
    if place.low is not None and place.high is not None:
        # a studentised interval need not be symmetric, but it holds the estimate
        bars = [[max(0.0, place.lost - place.low)], [max(0.0, place.high - place.lost)]]
    axes.errorbar(
        [place.speed],
        [place.lost],
        bars,
        color=colour,
        marker=place.style["marker"],
        markersize=6,
        capsize=2,
        linewidth=1,
        zorder=4,
    )


def _label(axes: Any, places: list[Place], top: float, line: float) -> None:
    """Write the labels beside the axes, in the order of the points and `line` (a share of the height) apart."""
    to_axes = axes.transData + axes.transAxes.inverted()
    points = [to_axes.transform((p.speed, top if p.off else p.lost)) for p in places]
    order = sorted(range(len(places)), key=lambda i: (points[i][1], places[i].lost))
    heights = spread([points[i][1] for i in order], line)
    for i, height in zip(order, heights, strict=True):
        place = places[i]
        axes.annotate(
            place.label,
            tuple(points[i]),
            (1.05, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            annotation_clip=False,
            arrowprops={**_LEADER, "color": place.style["color"]},
        )


def spread(heights: list[float], least: float) -> list[float]:
    """Return ascending heights moved apart until `least` lies between neighbours, within [0, 1] where that has room."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + least) if moved else max(0.0, height))
    limit = max(1.0, (len(heights) - 1) * least)
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - least
    return moved


def _scale_speed(axes: Any, slow: float, fast: float) -> None:
    """Mark round speeds between the two."""
    ticks = _FINE if fast / slow < 2.5 else _MIDDLE if fast / slow < 12 else _COARSE
    shown = [tick for tick in ticks if slow <= tick <= fast]
    axes.set_xticks(shown, [f"{tick:g}x" for tick in shown])
    axes.set_xticks([], minor=True)
