"""The pictures of a calibration, one file each; they are drawn from the content of calibration.json alone."""

from __future__ import annotations

from typing import Any

from ...evaluate.plot import check_plot
from .frontier import frontier
from .units import units

FRONTIER = "frontier.png"
UNITS = "units.png"


def draw_pictures(figures: dict[str, Any]) -> dict[str, bytes]:
    """Return every picture by the name of its file.

    Raises:
        ValueError: matplotlib is missing.
    """
    check_plot()
    return {FRONTIER: frontier(figures), UNITS: units(figures)}
