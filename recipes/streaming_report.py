"""The figures of `streaming_curve.py` as JSON, as lines a person reads, and as a picture."""

import io
import json
from itertools import compress
from pathlib import Path
from statistics import mean
from typing import Any

from hf_sparse.evaluate.output_folder import check_output_folder, write_atomically
from hf_sparse.evaluate.plot import check_plot

FILLED = 2_000  # tokens after which the default window is full
SMOOTH = 5  # samples
CONTROL = "streaming_llm on a new cache for every sample"
EARLY = (1_000, 10_000)  # tokens whose loss is compared with that of the last tenth


def check_writable(*files: Path) -> None:
    """Raise ValueError where a result could not be written; make the folders."""
    check_plot()
    for file in files:
        check_output_folder("the folder of", file.parent)
        file.parent.mkdir(parents=True, exist_ok=True)


def summary(samples: list[dict[str, Any]], control: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return what became of memory, time and loss: nothing where the run was too short to tell.

    bytes: fewest and most from FILLED tokens on.
    loss_early, loss_late: mean of the tokens EARLY and of the last tenth, nats per token.
    above_control_early, above_control_late: the same less the control's, whose text is as hard.
    """
    if samples[-1]["tokens"] <= EARLY[1]:
        return {}
    full = [s for s in samples if s["tokens"] >= FILLED]
    late = [s["tokens"] > 0.9 * samples[-1]["tokens"] for s in samples]
    early = [EARLY[0] < s["tokens"] <= EARLY[1] for s in samples]
    found: dict[str, Any] = {"bytes": [min(s["bytes"] for s in full), max(s["bytes"] for s in full)]}
    for name, chosen in (("early", early), ("late", late)):
        found[f"loss_{name}"] = mean(s["loss"] for s in compress(samples, chosen))
        if control:
            found[f"above_control_{name}"] = found[f"loss_{name}"] - mean(
                s["loss"] for s in compress(control, chosen)
            )
    return found


def save(record: dict[str, Any], results: Path, plot: Path | None = None) -> None:
    """Write the figures, and the picture of them."""
    write_atomically(results, f"{json.dumps(record, indent=1)}\n".encode())
    if plot is not None:
        write_atomically(plot, picture(record["runs"], record["machine"]))


def picture(runs: dict[str, Any], machine: dict[str, Any]) -> bytes:
    """Return a PNG of three panels over the tokens read: memory, time of a step, and loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    control = [s["loss"] for s in runs[CONTROL]["samples"]]
    widths = iter((4.0, 2.5, 1.2, 1.2))  # runs may lie on each other
    for name, run in runs.items():
        if name == CONTROL:
            continue
        samples = run["samples"]
        tokens = [s["tokens"] for s in samples]
        dense = name == "dense"
        style = {"linewidth": next(widths), "linestyle": "--" if dense else "-"}
        label = f"dense, up to {tokens[-1]:,} tokens" if dense else name
        above = [s["loss"] - c for s, c in zip(samples, control, strict=False)]
        panels[0].plot(tokens, [s["bytes"] / 2**20 for s in samples], **style)
        panels[1].plot(tokens, smooth([1e3 * s["step_seconds"] for s in samples]), **style)
        panels[2].plot(tokens, smooth(above), **style, label=label)
    panels[2].axhline(0, color="gray", linewidth=0.8)
    titles = (
        "memory of the cache [MiB]",
        "time of a step of one token [ms]",
        "loss above the control's [nats/token]",
    )
    for panel, title in zip(panels, titles, strict=True):
        panel.set(title=title, xlabel="tokens read", xscale="log")
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        panel.grid(alpha=0.3)
    panels[0].set_yscale("log", base=2)
    panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panels[1].set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.suptitle(
        f"{machine['device_name']}, {machine['threads']} thread(s); time and loss: means of up to {SMOOTH} samples; "
        f"control: {CONTROL}",
        fontsize="small",
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def smooth(values: list[float]) -> list[float]:
    """Return the mean of each value and those next to it, SMOOTH in all, fewer at the ends."""
    half = SMOOTH // 2
    return [mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
