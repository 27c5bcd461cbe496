"""A calibration on disk: every figure, the frontier for a spreadsheet, and pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..evaluate.csv_files import as_csv
from ..evaluate.output_folder import write_folder
from .result import Calibration
from .table import points, titles, units_of_each

RESULT_FILE = "calibration.json"
FRONTIER_FILE = "frontier.csv"


def save_calibration(
    result: Calibration, folder: str | os.PathLike[str], pictures: bool = False
) -> list[Path]:
    """Write calibration.json (every figure) and frontier.csv into `folder`; return the paths, calibration.json first.

    Each file appears whole or not at all and replaces one of its name; `hf_sparse.save_pattern` is for the pattern.

    Args:
        pictures: also frontier.png and units.png.
    Raises:
        ValueError: pictures without matplotlib; nothing is written then.
    """
    figures = result.as_json()
    files = {FRONTIER_FILE: frontier_csv(result).encode()}
    if pictures:
        from .pictures import draw_pictures

        files |= draw_pictures(figures)
    files[RESULT_FILE] = (json.dumps(figures, indent=1) + "\n").encode()  # last: where it is, all is
    *others, result_file = write_folder(Path(folder), files)
    return [result_file, *others]


def frontier_csv(result: Calibration) -> str:
    """Return a row per choice, each candidate in all units included.

    ``cost`` is a share of dense, ``amount`` the same in pairs, bytes or seconds; the columns ``units: ...`` count the
    units that run each candidate.
    """
    rows = []
    names = titles([str(candidate) for candidate in result.candidates])
    for title, on_frontier, point in points(result):
        counts = units_of_each(point.choice, len(result.candidates))
        rows.append(
            {
                "choice": title,
                "frontier": on_frontier,
                "chosen": bool((point.choice == result.chosen.choice).all()),
                "cost": point.cost,
                "of": result.costs.measure,
                "amount": point.cost * result.costs.dense,
                "density": point.density,
                result.config["objective"]: point.value,
                "above_dense": point.value - result.dense.value,
                "closed": result.closed(point),
                **{f"units: {name}": n for name, n in zip(names, counts, strict=True)},
            }
        )
    return as_csv(rows)
