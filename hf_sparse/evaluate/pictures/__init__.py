"""The pictures of an evaluation, one file each; they are drawn from the content of results.json alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..figures import as_json
from ..plot import check_plot, write_picture
from ..results import Result
from .loss_by_position import loss_by_position
from .perplexity_by_context import perplexity_by_context
from .quality_against_speed import quality_against_speed

LOSS_BY_POSITION = "loss_by_position.png"
PERPLEXITY_BY_CONTEXT = "perplexity_by_context.png"
QUALITY_AGAINST_SPEED = "quality_against_speed.png"


def draw_pictures(figures: dict[str, Any]) -> dict[str, bytes]:
    """Return every picture that the figures have the data for, by the name of its file.

    Raises:
        ValueError: matplotlib is missing.
    """
    check_plot()
    drawn = {LOSS_BY_POSITION: loss_by_position(figures)}
    if figures["config"]["contexts"]:
        drawn[PERPLEXITY_BY_CONTEXT] = perplexity_by_context(figures)
    if any(run["held_against"] for run in figures["runs"]):
        drawn[QUALITY_AGAINST_SPEED] = quality_against_speed(figures)
    return drawn


def plot_loss_by_position(result: Result, path: str | os.PathLike[str]) -> Path:
    """Write the PNG of `loss_by_position`; raise ValueError where matplotlib is missing."""
    check_plot()
    return write_picture(loss_by_position(as_json(result)), path)


def plot_perplexity_by_context(result: Result, path: str | os.PathLike[str]) -> Path:
    """Write the PNG of `perplexity_by_context`; raise ValueError where matplotlib or the curve is missing."""
    check_plot()
    return write_picture(perplexity_by_context(as_json(result)), path)


def plot_quality_against_speed(result: Result, path: str | os.PathLike[str]) -> Path:
    """Write the PNG of `quality_against_speed`; raise ValueError where matplotlib or a timed pattern is missing."""
    check_plot()
    return write_picture(quality_against_speed(as_json(result)), path)
