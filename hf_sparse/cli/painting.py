"""The mask of a pattern as a PNG: a panel per group of heads, a colour per member of a union or part of a pattern."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluate.output_folder import write_atomically
from ..evaluate.plot import check_plot
from ..patterns import Pattern
from .areas import Area, areas
from .picture import HeadGroup, dense_pairs

# Okabe and Ito's colours, which people with any colour vision tell apart
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
_ITSELF, _NOT_SEEN, _FUTURE = "#555555", "#E9EDF1", "#FFFFFF"
_DPI = 150
_LEFT, _RIGHT, _BELOW, _ABOVE = 100, 40, 90, 46  # pixels around a panel, for its labels
_LINE = 34  # pixels of a line of text outside the panels
_LARGE = 10  # pixels of a cell from which the cells are drawn apart


def check_png(path: str) -> None:
    """Raise ValueError where matplotlib is missing or the file cannot be written; leave nothing behind."""
    from ..evaluate.output_folder import check_output_folder

    if not path.lower().endswith(".png") or "\0" in path:
        raise ValueError(f"--png writes a PNG, and {path!r} is no name of one; end it with .png")
    if Path(path).is_dir():
        raise ValueError(f"--png {path} is a folder; name a file in it, such as {Path(path) / 'mask.png'}")
    check_output_folder("--png", Path(path).parent)
    check_plot()


def paint(
    groups: Sequence[HeadGroup],
    pattern: Pattern,
    path: str,
    *,
    heads: int,
    causal: bool,
    layer: int,
    note: str,
) -> None:
    """Write the PNG whole or not at all; every cell is a whole number of pixels wide, so that thin lines stay even.

    Args:
        groups: the heads that see the same, one panel each.
        note: what stands under the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    length = len(groups[0].allowed)
    named = areas(pattern, length, heads=heads, causal=causal, layer=layer)
    columns = len(groups) if len(groups) <= 3 else math.ceil(math.sqrt(len(groups)))
    rows = math.ceil(len(groups) / columns)
    cell = _cell_pixels(length, len(groups))
    panel = cell * length
    width = max(columns * (panel + _LEFT + _RIGHT), 760)
    letters = int(width / 14)
    title = textwrap.wrap(str(pattern), letters, break_on_hyphens=False)
    legend = [(area.name, _COLOURS[i % len(_COLOURS)]) for i, area in enumerate(named)]
    head = _LINE * (len(title) + 1) + 30
    foot = (_LINE * len(legend) + 10) if legend else 0
    height = head + rows * (panel + _BELOW + _ABOVE) + foot
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    left = (width - columns * (panel + _LEFT + _RIGHT)) // 2 + _LEFT
    for i, group in enumerate(groups):
        x = left + (i % columns) * (panel + _LEFT + _RIGHT)
        y = foot + _BELOW + (rows - 1 - i // columns) * (panel + _BELOW + _ABOVE)
        axes = figure.add_axes((x / width, y / height, panel / width, panel / height))
        axes.imshow(_colours(group, named, causal), interpolation="nearest")
        _label(axes, length, apart=cell >= _LARGE)
        if len(groups) > 1:
            density = group.pairs / dense_pairs(length, causal)
            axes.set_title(f"{group.title}: density {density:.1%}", fontsize=9)
    for i, line in enumerate(title):
        figure.text(
            0.5, 1 - (_LINE * i + 18) / height, line, ha="center", va="top", fontsize=10, weight="bold"
        )
    below = 1 - (_LINE * len(title) + 18) / height
    figure.text(0.5, below, note, ha="center", va="top", fontsize=9, color="#555555")
    if legend:
        handles = [Patch(color=colour, label=name) for name, colour in legend]
        figure.legend(handles=handles, loc="lower center", fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), buffer.getvalue())


def _cell_pixels(length: int, panels: int) -> int:
    """Return the width of a cell; many panels get smaller ones."""
    wanted = 720 if panels == 1 else 480 if panels <= 4 else 320
    least = 2 if panels <= 4 else 1
    return min(max(wanted // length, least), 48)


def _colours(group: HeadGroup, named: Sequence[Area], causal: bool) -> np.ndarray:
    """Return the colour of each cell, uint8 [N, N, 3]: that of the first area it lies in."""
    allowed = group.allowed.numpy()
    cells = np.full((*allowed.shape, 3), _rgb(_NOT_SEEN), dtype=np.uint8)
    if causal:
        cells[np.triu_indices(len(allowed), 1)] = _rgb(_FUTURE)
    cells[allowed] = _rgb(_ITSELF if named else _COLOURS[0])
    for i in reversed(range(len(named))):
        cells[named[i].cells[group.heads[0]].numpy() & allowed] = _rgb(_COLOURS[i % len(_COLOURS)])
    return cells


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _label(axes: Any, length: int, apart: bool) -> None:
    """Number the positions, and draw lines between the cells where they are wanted apart."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128) if length / step <= 9 or step == 128)
    places = range(0, length, step)
    axes.set_xticks(places)
    axes.set_yticks(places)
    axes.tick_params(labelsize=8, length=3, color="#999999")
    axes.set_xlabel("key", fontsize=9)
    axes.set_ylabel("query", fontsize=9)
    for side in axes.spines.values():
        side.set_visible(False)
    if apart:
        for place in range(1, length):
            axes.axhline(place - 0.5, color="white", linewidth=0.8)
            axes.axvline(place - 0.5, color="white", linewidth=0.8)
