"""The picture of an analysis: layers x heads of every pattern on one scale, and the pattern that each head wants."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..evaluate.plot import new_figure, png, short

_CELL = 0.26  # inches
_NARROW, _WIDE, _LOW, _TALL = 2.1, 3.2, 1.5, 3.2  # inches of a panel
_LEAST_WIDTH = 8  # inches of the picture
_AROUND, _ABOVE, _KEY = 0.85, 0.75, 0.2  # inches beside a panel, above and below it, and of a line of the key
_MOST_TICKS = 12
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_LEAST_SCALE = 0.05  # the scale does not magnify what differs by less


def heatmap(found: dict[str, Any]) -> bytes:
    """Return a PNG: a panel per pattern, dark where a head keeps little of its mass, and a last one of what is wanted.

    Args:
        found: the content of analysis.json.
    Raises:
        ValueError: matplotlib is missing.
    """
    patterns, layers, wanted = found["patterns"], found["layers"], np.array(found["wanted"])
    panels = len(patterns) + 1
    width = _sized(wanted.shape[1], _NARROW, _WIDE)
    columns = min(panels, max(2, round(math.sqrt(panels * 1.2))))
    rows = math.ceil(panels / columns)
    height = _sized(wanted.shape[0], _LOW, _TALL)
    used = [number for number in range(len(patterns)) if (wanted == number).any()]
    figure = new_figure(
        max(columns * (width + _AROUND) + 0.9, _LEAST_WIDTH),
        rows * (height + _ABOVE) + 0.9 + _KEY * math.ceil(len(used) / 2),
        layout="constrained",
    )
    axes = list(figure.subplots(rows, columns, squeeze=False).flatten())
    masses = np.array([pattern["mass"] for pattern in patterns])
    least = min(math.floor(masses.min() * 20) / 20, 1 - _LEAST_SCALE)
    image: Any = None
    for panel, pattern, mass in zip(axes, patterns, masses, strict=False):
        image = panel.imshow(mass, cmap="viridis", vmin=least, vmax=1, aspect="auto", interpolation="nearest")
        mark = "" if pattern["comparable"] else ", denser than asked for"
        panel.set_title(
            f"{short(pattern['name'])}\nmean {mass.mean():.3f} at {pattern['density']:.1%}{mark}",
            fontsize=8.5,
        )
        _label(panel, layers, mass.shape[1])
    _draw_wanted(figure, axes[len(patterns)], patterns, wanted, used)
    _label(axes[len(patterns)], layers, wanted.shape[1])
    for panel in axes[panels:]:
        panel.set_visible(False)
    bar = figure.colorbar(image, ax=axes[:panels], shrink=1 if rows == 1 else 0.6, aspect=20 * rows, pad=0.01)
    bar.set_label("share of dense mass kept", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    config = found["config"]
    name = config["model"] or config["architecture"]
    figure.suptitle(
        f"{short(name)}\nattention mass kept at a density of about {found['density']:.1%}, {config['length']:,} tokens",
        fontsize=11,
    )
    return png(figure)


def _sized(cells: int, least: float, most: float) -> float:
    return min(max(cells * _CELL, least), most)


def _draw_wanted(
    figure: Any, axes: Any, patterns: list[dict[str, Any]], wanted: np.ndarray, used: list[int]
) -> None:
    """Colour each cell by the pattern that its head wants, and explain the colours below all panels."""
    import matplotlib
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    colours = matplotlib.color_sequences["tab20" if len(used) > 10 else "tab10"]
    of = {number: to_rgb(colours[place % len(colours)]) for place, number in enumerate(used)}
    marks = {number: _LETTERS[place % len(_LETTERS)] for place, number in enumerate(used)}
    cells = np.array([[of[number] for number in row] for row in wanted.tolist()])
    axes.imshow(cells, aspect="auto", interpolation="nearest")
    axes.set_title("wanted by each head", fontsize=8.5, fontweight="bold")
    layers, heads = wanted.shape
    is_readable = layers * _CELL <= _TALL and heads * _CELL <= _WIDE
    if is_readable:
        for row, head in np.ndindex(wanted.shape):
            mark = marks[int(wanted[row, head])]
            axes.text(head, row, mark, ha="center", va="center", color="white", fontsize=7, fontweight="bold")
    key = [
        Patch(
            color=of[number],
            label=f"{marks[number] + '  ' if is_readable else ''}{short(patterns[number]['label'])}: "
            f"{patterns[number]['wanted_by']}",
        )
        for number in used
    ]
    figure.legend(
        handles=key,
        loc="outside lower center",
        fontsize=8,
        ncols=2,
        title="wanted by so many heads",
        frameon=False,
    )


def _label(axes: Any, layers: list[int], heads: int) -> None:
    step = -(-len(layers) // _MOST_TICKS)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_xticks(range(0, heads, -(-heads // _MOST_TICKS)))
    axes.tick_params(labelsize=7, length=2)
    axes.set_ylabel("layer", fontsize=8)
    axes.set_xlabel("query head", fontsize=8)
