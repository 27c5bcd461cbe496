"""Layers x units: what each would gain from dense attention, and what each got."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...evaluate.plot import new_figure, png, short
from ..table import most_frequent, symbols, titles, units_of_each

_CELL, _CHARACTER = 0.34, 0.22  # inches
_NARROW, _WIDE, _LOW, _TALL = 2.6, 6.5, 1.6, 9.5  # inches of a panel
_MOST_TICKS = 20
_COLOURS = ("0.93", "C0", "C1", "C2", "C4", "C5", "C6", "C8", "C9")  # the first is of the cheapest candidate
_DENSE = "C3"
_UNIT_NAMES = {"head": "query head", "kv_head": "key-value head", "layer": ""}


def units(figures: dict[str, Any]) -> bytes:
    """Return a PNG of two maps [layers, units]: the first gains of dense over the cheapest choice, and the choice.

    Where there is room for it, the symbol of the chosen candidate is written into each cell.

    Args:
        figures: the content of calibration.json.
    Raises:
        ValueError: matplotlib is missing.
    """
    gains = np.array(figures["gains"])[..., 0]
    choice = np.array(figures["chosen"]["choice"])
    names = titles(figures["config"]["candidates"])
    cheapest = most_frequent(np.array(figures["frontier"][0]["choice"]))
    marks = symbols(len(names), cheapest)
    layers, count = choice.shape
    width, height = _size(count, _NARROW, _WIDE), _size(layers, _LOW, _TALL)
    figure = new_figure(2 * width + 1.8, height + 1.3 + 0.2 * len(names), layout="constrained")
    panels = figure.subplots(1, 2)
    image = panels[0].imshow(gains.clip(0), cmap="Blues", norm=_scaled(gains), aspect="auto")
    bar = figure.colorbar(image, ax=panels[0])
    bar.ax.tick_params(labelsize=7)
    score = short(figures["config"]["score"])
    panels[0].set_title(f"gain of dense over the cheapest\n{score}", fontsize=9)
    if _is_readable(choice):
        _write(panels[0], gains, choice, marks)
    _draw_choice(figure, panels[1], choice, names, marks, cheapest)
    for panel in panels:
        _label(panel, figures)
    return png(figure)


def _size(cells: int, least: float, most: float) -> float:
    return min(max(cells * _CELL, least), most)


def _is_readable(choice: np.ndarray) -> bool:
    """True where a character fits into each cell."""
    layers, count = choice.shape
    return layers * _CHARACTER <= _TALL and count * _CHARACTER <= _WIDE


def _scaled(gains: np.ndarray) -> Any:
    """Return a scale that lets small gains be told apart beside the few large ones."""
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, vmin=0, vmax=max(float(gains.max()), 1e-12))


def _write(axes: Any, gains: np.ndarray, choice: np.ndarray, marks: list[str]) -> None:
    dark = 0.4 * max(float(gains.max()), 1e-12)
    for layer, unit in np.ndindex(choice.shape):
        colour = "white" if gains[layer, unit] > dark else "black"
        text = marks[choice[layer, unit]]
        axes.text(unit, layer, text, ha="center", va="center", color=colour, fontsize=8, fontweight="bold")


def _draw_choice(
    figure: Any, axes: Any, choice: np.ndarray, names: list[str], marks: list[str], cheapest: int
) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    others = iter(_COLOURS[1:] * (len(names) // 8 + 1))
    colours = [
        _DENSE if number == 0 else _COLOURS[0] if number == cheapest else next(others)
        for number in range(len(names))
    ]
    axes.imshow(np.array([to_rgb(colour) for colour in colours])[choice], aspect="auto")
    layers, count = choice.shape
    if _is_readable(choice):
        axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(layers + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="minor", length=0)
    chosen = units_of_each(choice, len(names))
    axes.set_title("chosen", fontsize=9)
    patches = [
        Patch(facecolor=colour, edgecolor="0.6", label=f"{mark}  {short(name)}: {number}")
        for colour, mark, name, number in zip(colours, marks, names, chosen, strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", fontsize="small", ncols=1, title="units")


def _label(axes: Any, figures: dict[str, Any]) -> None:
    layers, unit = figures["layers"], figures["unit"]
    step = -(-len(layers) // _MOST_TICKS)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=7)
    axes.set_ylabel("layer", fontsize=8)
    count = len(figures["chosen"]["choice"][0])
    step = -(-count // _MOST_TICKS) if unit != "layer" else 1
    axes.set_xticks(range(0, count, step) if unit != "layer" else [])
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel(_UNIT_NAMES[unit], fontsize=8)
