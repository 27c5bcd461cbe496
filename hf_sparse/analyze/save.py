"""An analysis on disk: every figure, the masses for a spreadsheet, and the heat map."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluate.csv_files import as_csv
from ..evaluate.output_folder import check_output_folder, write_folder
from ..evaluate.plot import check_plot
from .heatmap import heatmap

if TYPE_CHECKING:
    from .result import Analysis

RESULT, MASS, HEATMAP = FILES = ("analysis.json", "mass.csv", "heatmap.png")


def save(analysis: Analysis, folder: str | os.PathLike[str], overwrite: bool) -> list[Path]:
    """Write every file whole or not at all; return their paths, in the order of FILES."""
    check_can_be_saved("folder", folder, overwrite)
    found = analysis.as_json()
    files = {MASS: mass_csv(analysis).encode(), HEATMAP: heatmap(found)}
    files[RESULT] = (json.dumps(found, indent=1) + "\n").encode()  # last: where it is, all is
    written = {path.name: path for path in write_folder(Path(folder), files)}
    return [written[name] for name in FILES]


def check_can_be_saved(setting: str, folder: str | os.PathLike[str], overwrite: bool) -> None:
    """Raise ValueError where an analysis cannot be written into a folder; leave nothing behind.

    Args:
        setting: what the user calls the folder.
    """
    check_plot()
    check_output_folder(setting, folder)
    if overwrite:
        return
    for name in FILES:
        if (path := Path(folder) / name).exists():
            raise ValueError(f"{path} exists; name another folder, or replace it (--overwrite).")


def mass_csv(analysis: Analysis) -> str:
    """Return a row per pattern, layer and head."""
    wanted = analysis.wanted
    rows = []
    for number, (longer, density) in enumerate(zip(analysis.labels, analysis.densities, strict=True)):
        for row, layer in enumerate(analysis.layers):
            for head, mass in enumerate(analysis.mass[number, row].tolist()):
                rows.append(
                    {
                        "pattern": longer,
                        "density": density,
                        "layer": layer,
                        "head": head,
                        "mass": mass,
                        "wanted": bool(wanted[row, head] == number),
                    }
                )
    return as_csv(rows)
