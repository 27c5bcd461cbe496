"""The pictures of `compare_patterns.py`: quality against speed, one attention call, memory."""

import math
from typing import Any

from compare_patterns_rows import DENSE, Row, is_placed, unbeaten

from hf_sparse.evaluate.pictures.quality_against_speed import spread
from hf_sparse.evaluate.plot import FARTHEST, LEAST_SPAN, new_figure, png, scale_loss, styles

LINE = 0.19  # inches from one name to the next
TICKS = (0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150)
LENGTH_STYLES = (
    {"color": "C0", "marker": "o"},
    {"color": "C1", "marker": "s"},
    {"color": "C3", "marker": "^"},
)


def draw_quality_against_speed(by_length: dict[int, list[Row]], trained: int | None) -> bytes:
    """Return a PNG with a panel per length: each pattern by its speed at reading a prompt and its loss.

    Patterns that lost more than FARTHEST nats per token lie at the upper edge, with their loss behind the name.
    """
    style = _styles(by_length)
    known = {n: [row for row in rows if is_placed(row)] for n, rows in by_length.items()}
    known = {n: rows for n, rows in known.items() if rows}
    most = max(len(rows) for rows in known.values())
    tall = max(4.5, LINE * (most + 1))
    panel, names, width = 3.4, 2.3, 0.75
    figure = new_figure(width + (panel + names) * len(known), tall + 1.2)
    size = figure.get_size_inches()
    on = [row for rows in known.values() for row in rows if row["nats_above_dense"] <= FARTHEST]
    ends = [end for row in on for end in _interval(row)]
    low, high = 1.3 * min([-LEAST_SPAN, *ends]), 1.5 * max([2 * LEAST_SPAN, *ends])
    speeds = [1.0, *(row["prompt_times"] for rows in known.values() for row in rows)]
    for number, (length, rows) in enumerate(known.items()):
        left = width + number * (panel + names)
        axes = figure.add_axes((left / size[0], 0.75 / size[1], panel / size[0], tall / size[1]))
        axes.set(xscale="log", xlabel="times as fast as dense, reading a prompt")
        axes.set_xlim(min(speeds) / 1.2, max(speeds) * 1.2)
        scale_loss(axes, low, high)
        _scale_times(axes)
        axes.set_title(_title(length, trained), fontsize=10)
        if number == 0:
            axes.set_ylabel("nats/token above dense, 95 % interval")
        axes.grid(alpha=0.3)
        axes.axhline(0, color="0.45", linewidth=0.8)
        axes.axvline(1, color="0.45", linewidth=0.8)
        axes.plot([1], [0], marker="*", markersize=13, color="0.2", linestyle="none", zorder=3)
        axes.annotate("dense", (1, 0), (6, -11), textcoords="offset points", fontsize=8)
        for row in rows:
            _mark(axes, row, style[row["pattern"]], high)
        _name(axes, rows, style, high, LINE / tall)
    note = "bold: faster than dense and than every pattern that loses less"
    figure.text(width / size[0], 0.08 / size[1], note, fontsize=8)
    return png(figure)


def draw_operators(by_length: dict[int, list[Row]]) -> bytes:
    """Return a PNG with a panel per length: how many times as fast as dense one call of each pattern is."""
    names = _names(by_length, "forward_times")
    figure = new_figure(
        2.2 + 3.6 * len(by_length), 1.4 + LINE * 1.15 * max(len(names), 4), layout="constrained"
    )
    panels = figure.subplots(1, len(by_length), sharey=True, squeeze=False)[0]
    for axes, (length, rows) in zip(panels, by_length.items(), strict=True):
        found = {row["pattern"]: row for row in rows}
        for key, label, style in (
            (
                "pairs_limit",
                "limit: pairs of dense over its own",
                {"color": "0.6", "marker": "|", "markersize": 13},
            ),
            ("forward_times", "forward", {"color": "C0", "marker": "o", "markersize": 6}),
            ("backward_times", "forward + backward", {"color": "C1", "marker": "s", "markersize": 5}),
        ):
            _dots(axes, names, found, key, style | {"label": label if axes is panels[0] else None})
        axes.set(xscale="log", title=f"{length:,} tokens", xlabel="times as fast as dense")
        axes.axvline(1, color="0.45", linewidth=0.8)
        _scale_times(axes)
    _rows_named(panels, names)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    return png(figure)


def draw_memory(by_length: dict[int, list[Row]]) -> bytes:
    """Return a PNG of three panels: the cache after a prompt, the prompt's pass, one call with its backward pass."""
    names = _names(by_length, "kv_bytes")
    figure = new_figure(13, 1.4 + LINE * 1.15 * max(len(names), 4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    titles = {
        "kv_bytes": "keys and values held after a prompt",
        "prompt_bytes": "most held while the prompt is read",
        "backward_bytes": "one attention call, forward + backward",
    }
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for (length, rows), style in zip(by_length.items(), LENGTH_STYLES * len(by_length), strict=False):
            label = f"{length:,} tokens" if axes is panels[0] else None
            found = {row["pattern"]: row | {key: row[key] and row[key] / 2**20} for row in rows}
            _dots(axes, names, found, key, style | {"markersize": 6, "label": label})
            if found[DENSE][key]:
                axes.axvline(found[DENSE][key], color=style["color"], linewidth=0.9, linestyle=":")
        axes.set(xscale="log", title=title, xlabel="MiB; dotted: dense")
        axes.title.set_fontsize(10)
        _scale_mebibytes(axes)
    _rows_named(panels, names)
    figure.legend(loc="outside lower center", ncols=len(by_length), fontsize="small")
    return png(figure)


def _styles(by_length: dict[int, list[Row]]) -> dict[str, dict[str, Any]]:
    names = _names(by_length, "pattern")
    return dict(zip(names, styles([name != DENSE for name in names]), strict=True))


def _names(by_length: dict[int, list[Row]], key: str) -> list[str]:
    """Return the patterns that have a figure `key` somewhere, dense first, in the order they are listed in."""
    found = {
        row["pattern"]: row["place"] for rows in by_length.values() for row in rows if row[key] is not None
    }
    return sorted(found, key=lambda name: found[name])


def _title(length: int, trained: int | None) -> str:
    beyond = f": extrapolation (trained on {trained:,})" if trained and length > trained else ""
    return f"{length:,} tokens{beyond}"


def _interval(row: Row) -> tuple[float, float]:
    """Return the ends of the interval, which are the estimate where a single document gives none."""
    low, high = row["nats_above_dense_low"], row["nats_above_dense_high"]
    return (row["nats_above_dense"],) * 2 if low is None or high is None else (low, high)


def _mark(axes: Any, row: Row, style: dict[str, Any], top: float) -> None:
    from matplotlib.colors import to_rgba

    lost, speed = row["nats_above_dense"], row["prompt_times"]
    if lost > FARTHEST:
        axes.plot([speed], [top], marker="^", markersize=8, color=style["color"], clip_on=False, zorder=4)
        return
    bars = [[max(0.0, lost - _interval(row)[0])], [max(0.0, _interval(row)[1] - lost)]]
    look = {"color": style["color"], "marker": style["marker"], "markersize": 5, "linewidth": 0}
    axes.errorbar([speed], [lost], bars, elinewidth=1, ecolor=to_rgba(style["color"], 0.35), zorder=4, **look)


def _name(axes: Any, rows: list[Row], style: dict[str, dict[str, Any]], top: float, line: float) -> None:
    """Write the names beside the panel in the order of the points, `line` (a share of the height) apart."""
    to_axes = axes.transData + axes.transAxes.inverted()
    points = {
        row["pattern"]: to_axes.transform((row["prompt_times"], min(row["nats_above_dense"], top)))
        for row in rows
    }
    front = unbeaten(rows)
    ordered = sorted(rows, key=lambda row: (points[row["pattern"]][1], row["nats_above_dense"]))
    heights = spread([float(points[row["pattern"]][1]) for row in ordered], line)
    for row, height in zip(ordered, heights, strict=True):
        lost = row["nats_above_dense"]
        text = row["pattern"] + (f"  {lost:+.1f}" if lost > FARTHEST else "")
        colour = style[row["pattern"]]["color"]
        axes.annotate(
            text,
            tuple(points[row["pattern"]]),
            (1.06, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            fontsize=8,
            fontweight="bold" if row["pattern"] in front else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0, 0.5),
                "linewidth": 0.6,
                "alpha": 0.7,
                "color": colour,
            },
        )


def _scale_times(axes: Any) -> None:
    low, high = axes.get_xlim()
    shown = [tick for tick in TICKS if low <= tick <= high]
    shown = shown if len(shown) < 8 else shown[::2]
    axes.set_xticks(shown, [f"{tick:g}x" for tick in shown])
    axes.set_xticks([], minor=True)


def _scale_mebibytes(axes: Any) -> None:
    """Mark powers of 2 between the ends, at most eight."""
    low, high = (math.log2(end) for end in axes.get_xlim())
    powers = range(math.ceil(low), math.floor(high) + 1)
    shown = [2.0**power for power in powers[:: -(-len(powers) // 8) or 1]]
    axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
    axes.set_xticks([], minor=True)


def _dots(axes: Any, names: list[str], found: dict[str, Row], key: str, style: dict[str, Any]) -> None:
    places = [i for i, name in enumerate(names) if found.get(name, {}).get(key)]
    axes.plot([found[names[i]][key] for i in places], places, linestyle="none", **style)


def _rows_named(panels: Any, names: list[str]) -> None:
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    for axes in panels:
        axes.grid(alpha=0.3)
