"""The loss by position as a picture."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np

from .bootstrap import difference
from .report import write_atomically
from .results import Result

LEAST_SPAN = 0.01  # nats/token shown to each side of dense
FARTHEST = 1.5  # nats/token above the best run; a run that lost more is named, as it would flatten the rest


def check_plot() -> None:
    """Raise ValueError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("plots need matplotlib; install it with: pip install 'hf_sparse[plot]'") from None


def plot_loss_by_position(result: Result, path: str | os.PathLike[str]) -> Path:
    """Write a PNG: nats per token by position above, and what each sparse run loses to dense below.

    The band is the 95 % interval of the loss, over documents; buckets in fewer than 5 documents get none.
    Runs that lost more than FARTHEST are named in the legend only.

    Raises:
        ValueError: matplotlib is missing.
    """
    check_plot()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 8), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    filled = np.flatnonzero(result.position_tokens.sum(axis=0))
    middle = 2.0 ** (filled + 0.5)
    best = min(result.perplexity(run) for run in result.runs)
    for i, run in enumerate(result.runs):
        if (excess := float(np.log(result.perplexity(run) / best))) > FARTHEST:
            above.plot([], [], color=f"C{i}", label=f"{run.title}: off the scale, {excess:.1f} nats above")
            continue
        style = {"color": f"C{i}", "marker": "o", "markersize": 3, "linestyle": "-" if run.sparse else "--"}
        style["linewidth"] = 1.5 if run.sparse else 3  # a run equal to dense leaves it visible
        above.plot(middle, result.loss_by_position(run)[filled], label=run.title, **style)
        if not run.sparse:
            continue
        dense = result.find(False, run.adapter)[0]
        lost, low, high = _lost(result, run.position_nats, dense.position_nats, filled)
        below.plot(middle, lost, **style)
        below.fill_between(middle, low, high, color=f"C{i}", alpha=0.2, linewidth=0)
    below.axhline(0, color="gray", linewidth=0.8)
    above.set(ylabel="nats/token", title="loss by position")
    below.set(xlabel="tokens before the scored token", ylabel="nats/token above dense")
    below.set_xscale("log", base=2)
    below.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    low, high = below.get_ylim()
    below.set_ylim(min(low, -LEAST_SPAN), max(high, LEAST_SPAN))  # rounding noise is not a picture
    figure.legend(loc="outside lower center", fontsize="small")
    above.grid(alpha=0.3)
    below.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
    return path


def _lost(
    result: Result, sparse: np.ndarray, dense: np.ndarray, filled: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the difference in each bucket with the ends of its interval, nan where too few documents reach it."""
    rows = []
    for bucket in filled:
        reach = result.position_tokens[:, bucket] > 0
        found = difference(
            sparse[reach, bucket],
            dense[reach, bucket],
            result.position_tokens[reach, bucket],
            seed=result.config["seed"],
        )
        known = found.units >= 5
        rows.append((found.estimate, found.low if known else np.nan, found.high if known else np.nan))
    lost, low, high = np.array(rows).T
    return lost, low, high
