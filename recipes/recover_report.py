"""The report of `recover.py`: tables in Markdown, every figure as JSON, the losses of every training, and a picture."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recover_cases import CONTROL, GOAL_OF_THE_WINDOW, GOALS, RECIPES

from hf_sparse.evaluate.output_folder import write_folder
from hf_sparse.evaluate.plot import new_figure, png

WINDOW_DENSITY = 0.234  # of SAME_DENSITY at the length
SPANS = ((1, 127), (128, 511), (512, 2047))  # tokens before, for what is left by position


def save_report(record: dict[str, Any], logs: Iterable[dict[str, Any]], folder: Path) -> list[Path]:
    """Write recovery.json, recovery.md, recovery_log.jsonl and recovery.png; return their paths."""
    files = {
        "recovery_log.jsonl": "".join(json.dumps(log) + "\n" for log in logs).encode(),
        "recovery.png": draw(record["recovery"]),
        "recovery.md": (markdown(record) + "\n").encode(),
        "recovery.json": (json.dumps(record, indent=1) + "\n").encode(),
    }
    return write_folder(folder, files)


def markdown(record: Mapping[str, Any]) -> str:
    """Return the tables."""
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return "\n\n".join(
        [
            "# What a short training gives back",
            f"`{record['command']}`, {record['date']}; {machine['threads']} thread(s) of {machine['device_name']}; "
            f"{versions}.",
            "![gap closed](recovery.png)",
            "## Gap closed\n\nHeld-out test documents of 2,048 tokens, nats per token, [95 %] paired over documents. "
            "The control is the dense model trained on the same data with the same steps, seed and LoRA.",
            _recovery(record["recovery"]),
            "## What is left, by tokens before\n\nNats per token above the control, mean of the seeds.",
            _positions(record["recovery"]),
            "## Copying random tokens over a distance\n\nShare copied right, untrained → trained (first seed).",
            _copies(record["copy"]),
            "## What was tried\n\nOne training of 100 steps each, scored on validation documents against the dense "
            "model as it came; what a row does not name is as in the recipe.",
            _trials(record["trials"]),
        ]
    )


def _recovery(recovery: Mapping[str, list[dict[str, Any]]]) -> str:
    rows = []
    for name, seeds in recovery.items():
        first = seeds[0]
        closed = " · ".join(_share(row["closed"]) for row in seeds)
        goal = f"{GOALS[name]:.0%}" if name in GOALS else ""
        if name == "calibrated":
            goal = f"{GOAL_OF_THE_WINDOW:.0%} of the last"
        rows.append(
            [
                f"[{name}](../{name}.yaml)",
                f"{first['density']:.3f}",
                _nats(first["gap"]),
                closed,
                goal,
                " · ".join(_nats(row["residual"]) for row in seeds),
                " · ".join(_share(row["of_the_window"]) for row in seeds) if _is_as_dense(first) else "",
            ]
        )
    head = ["recipe", "density", "untrained, above dense", "gap closed, by seed", "asked", "left, by seed"]
    return _table([*head, "of the gap of a window of 256"], rows)


def _is_as_dense(row: Mapping[str, Any]) -> bool:
    """True where a recipe reads about as much as the window that its gap is compared with."""
    return abs(row["density"] - WINDOW_DENSITY) < 0.03


def _positions(recovery: Mapping[str, list[dict[str, Any]]]) -> str:
    rows = []
    for name, seeds in recovery.items():
        cells = []
        for first, last in SPANS:
            found = [
                (tokens, nats)
                for row in seeds
                for low, high, tokens, nats in row["residual_by_position"]
                if first <= low and high <= last
            ]
            total = sum(tokens for tokens, _ in found)
            cells.append(f"{sum(tokens * nats for tokens, nats in found) / total:.4f}" if total else "")
        rows.append([name, *cells])
    return _table(["recipe", *(f"{first:,} to {last:,}" for first, last in SPANS)], rows)


def _copies(copies: Mapping[str, Mapping[str, float]]) -> str:
    places = list(copies[CONTROL])
    rows = [[CONTROL, *(f"{copies[CONTROL][place]:.0%}" for place in places)]]
    for name in RECIPES:
        before, after = copies[name], copies[f"{name} trained"]
        rows.append([name, *(f"{before[place]:.0%} → {after[place]:.0%}" for place in places)])
    return _table(["recipe", *(f"{place} back" for place in places)], rows)


def _trials(trials: Sequence[Mapping[str, Any]]) -> str:
    rows = [[row["name"], row["recipe"], _share(row["closed"]), _nats(row["residual"])] for row in trials]
    return _table(["tried", "on", "gap closed", "left"], rows)


def _share(interval: Sequence[float] | None) -> str:
    if interval is None:
        return "no gap to close"
    estimate, low, high = interval
    return f"{estimate:.1%} [{low:.1%}, {high:.1%}]"


def _nats(interval: Sequence[float]) -> str:
    estimate, low, high = interval
    return f"{estimate:.4f} [{low:.4f}, {high:.4f}]"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(recovery: Mapping[str, list[dict[str, Any]]]) -> bytes:
    """A picture: gap closed by every recipe, a point with its interval for every seed."""
    figure = new_figure(8.0, 0.55 * len(recovery) + 1.2)
    axes = figure.add_subplot()
    figure.subplots_adjust(left=0.27, right=0.98, top=0.98, bottom=0.13)
    for place, (name, seeds) in enumerate(recovery.items()):
        for number, row in enumerate(seeds):
            height = place + 0.18 * (number - (len(seeds) - 1) / 2)
            of_window = row["of_the_window"] if _is_as_dense(row) else None
            for interval, color, mark in ((row["closed"], "tab:blue", "o"), (of_window, "tab:green", "s")):
                if interval is not None:
                    estimate, low, high = interval
                    reach = [[estimate - low], [high - estimate]]
                    axes.errorbar(estimate, height, xerr=reach, fmt=mark, color=color, markersize=4)
        goal = GOAL_OF_THE_WINDOW if name == "calibrated" else GOALS.get(name)
        if goal is not None:
            axes.plot([goal] * 2, [place - 0.4, place + 0.4], color="tab:red", linewidth=1.5)
    axes.set_yticks(
        range(len(recovery)), [f"{name}\n{rows[0]['density']:.2f}" for name, rows in recovery.items()]
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel(
        "gap closed by the adapter, three seeds, 95 % over documents\n"
        "(green: of the gap of a window of the same density; red: what was asked)"
    )
    axes.grid(axis="x", alpha=0.3)
    return png(figure)
