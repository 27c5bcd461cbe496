"""What all pictures share: matplotlib when it is there, a figure, colours of runs, PNG bytes."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output_folder import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FARTHEST = 1.5  # nats/token above the best run; a run that lost more is named, as it would flatten the rest
LEAST_SPAN = 0.01  # nats/token shown to each side of dense: rounding noise is not a picture

_LINES, _MARKERS, _GRAYS = ("-", "-.", ":"), "os^", ("0.2", "0.45", "0.65")
_COLOURS = 10
_LONGEST_TITLE = 80


def check_plot() -> None:
    """Raise ValueError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("plots need matplotlib; install it with: pip install 'hf_sparse[plot]'") from None


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """Return an empty figure of that many inches, which no window and no global state knows of.

    Raises:
        ValueError: matplotlib is missing.
    """
    check_plot()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), **options)
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """Return the picture; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def write_picture(content: bytes, path: str | os.PathLike[str]) -> Path:
    """Write a picture, making its folder, and return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    return path


def styles(is_sparse: list[bool]) -> list[dict[str, Any]]:
    """Return how each run is drawn: dense ones gray, dashed and thick, so that a run equal to dense leaves it visible.

    The first ten sparse runs have a colour each; the next ten the same colours with other lines and markers.
    """
    found, dense, sparse = [], 0, 0
    for drawn_sparse in is_sparse:
        if drawn_sparse:
            turn = sparse // _COLOURS % len(_LINES)
            style = {"color": f"C{sparse % _COLOURS}", "linestyle": _LINES[turn], "linewidth": 1.5}
            found.append({**style, "marker": _MARKERS[turn], "markersize": 3 + turn})
            sparse += 1
        else:
            style = {"color": _GRAYS[dense % len(_GRAYS)], "linestyle": "--", "linewidth": 3}
            found.append({**style, "marker": "o", "markersize": 3})
            dense += 1
    return found


def scale_loss(axes: Any, low: float, high: float) -> None:
    """Let the y axis reach from `low` to `high` nats/token: linear around 0, in powers of 10 beyond LEAST_SPAN."""
    axes.set_yscale("symlog", linthresh=LEAST_SPAN, linscale=0.5)
    axes.set_ylim(low, high)
    steps = [sign * step * 10.0**power for power in range(-2, 2) for step in (1, 3) for sign in (-1, 1)]
    shown = [0.0, *(step for step in steps if low <= step <= high)]
    axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axes.set_yticks([], minor=True)


def short(title: str) -> str:
    """Return a title that fits into a picture."""
    return title if len(title) <= _LONGEST_TITLE else f"{title[: _LONGEST_TITLE - 1]}…"
