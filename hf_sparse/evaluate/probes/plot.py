"""What the probes found as pictures: depth by length as heat maps, accuracy against distance as lines."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from ..plot import new_figure, png, short, styles
from .figures import Figures

COLUMNS = 4  # heat maps in a row
_LABELS = {"accuracy": "answers right", "tokens_right": "answer tokens right"}


def probe_pictures(figures: Figures) -> dict[str, bytes]:
    """Return a PNG per probe by its file name, from the content of probe.json.

    Raises:
        ValueError: matplotlib is missing.
    """
    found: dict[str, bytes] = {}
    for probe in figures["probes"]:
        draw = _lines if probe["axis"] == "distance" else _heat_maps
        words = "".join(c if c.isalnum() or c in "_-" else " " for c in probe["probe"]).split()
        found["_".join(words) + ".png"] = draw(figures, probe)
    return found


def _heat_maps(figures: Figures, probe: dict[str, Any]) -> bytes:
    """Draw the headline figure by depth and length, one map per run, all on the scale from 0 to 1."""
    runs, lengths, depths = figures["runs"], probe["lengths"], probe["places"]
    columns = min(COLUMNS, len(runs))
    rows = math.ceil(len(runs) / columns)
    width, height = max(3.0, 0.7 * len(lengths) + 0.8), 0.45 * len(depths) + 1.0
    figure = new_figure(columns * width + 1.2, rows * height + 0.5, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, run in zip(grid.flat, runs, strict=False):
        shares = _shares(run, probe)
        table = [[shares[length, depth]["estimate"] for length in lengths] for depth in depths]
        axes.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for y, row in enumerate(table):
            for x, share in enumerate(row):
                axes.text(
                    x,
                    y,
                    f"{share:.2f}",
                    ha="center",
                    va="center",
                    color="black" if share > 0.6 else "white",
                    fontsize="small",
                )
        axes.set_title(textwrap.fill(short(run["title"]), int(11 * width)), fontsize="small")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axes.label_outer()
    for axes in grid.flat[len(runs) :]:
        axes.set_visible(False)
    figure.supxlabel("length, tokens", fontsize="medium")
    figure.supylabel("depth (0 begin, 1 end)", fontsize="medium")
    figure.suptitle(_title(figures, probe), fontsize="medium")
    figure.colorbar(grid[0, 0].images[0], ax=grid, label=_LABELS[probe["headline"]], aspect=20 * rows)
    return png(figure)


def _lines(figures: Figures, probe: dict[str, Any]) -> bytes:
    """Draw the headline figure against the distance, a line with its interval per run and a mark at each window."""
    runs, lengths, distances = figures["runs"], probe["lengths"], sorted(probe["places"])
    figure = new_figure(8, 3.6 * len(lengths) + 0.25 * len(runs) + 0.6, layout="constrained")
    grid = figure.subplots(len(lengths), 1, squeeze=False, sharex=True)[:, 0]
    drawn = styles([run["pattern"] is not None for run in runs])
    for axes, length in zip(grid, lengths, strict=True):
        for run, style in zip(runs, drawn, strict=True):
            shares = [_shares(run, probe)[length, distance] for distance in distances]
            label = short(run["title"]) if axes is grid[0] else None
            axes.plot(distances, [share["estimate"] for share in shares], label=label, **style)
            low, high = ([share[end] for share in shares] for end in ("low", "high"))
            axes.fill_between(
                distances, low, high, color=style["color"], alpha=min(0.15, 0.6 / len(runs)), linewidth=0
            )
            if (window := run["window"]) is not None and distances[0] <= window <= distances[-1]:
                axes.axvline(window, color=style["color"], linestyle=":", linewidth=1.2)
        if len(lengths) > 1:
            axes.set_title(f"length {length:,} tokens", fontsize="small")
        axes.set(ylim=(-0.03, 1.03), ylabel=_LABELS[probe["headline"]])
        axes.grid(alpha=0.3)
    grid[-1].set_xscale("log", base=2)
    grid[-1].set_xticks(distances, [f"{distance:,}" for distance in distances], fontsize="small")
    grid[-1].set_xticks([], minor=True)
    grid[-1].set_xlabel("distance from a token back to its original, tokens (dotted: the pattern's window)")
    figure.suptitle(_title(figures, probe), fontsize="medium")
    figure.legend(loc="outside lower center", fontsize="small")
    return png(figure)


def _shares(run: dict[str, Any], probe: dict[str, Any]) -> dict[tuple[int, float], dict[str, Any]]:
    """Return the headline figure with its interval by length and place."""
    return {
        (cell["length"], cell["place"]): cell[probe["headline"]]
        for cell in run["cells"]
        if cell["probe"] == probe["probe"]
    }


def _title(figures: Figures, probe: dict[str, Any]) -> str:
    lengths = f", length {probe['lengths'][0]:,}" if len(probe["lengths"]) == 1 else ""
    chance = "" if probe["chance"] is None else f", by chance {probe['chance']:.2g}"
    return f"{probe['probe']}: {figures['config']['samples']} samples per point{lengths}{chance}"
