"""What the probes found as lines of text: per probe a row for each run and length, a column for each place."""

from __future__ import annotations

from typing import Any

from ..table import aligned
from .figures import Figures

_WORDS = {
    "accuracy": "share of answers that are right",
    "tokens_right": "share of answer tokens that are right",
}


def probe_table(figures: Figures) -> str:
    """Return what was measured, from the content of probe.json."""
    paragraphs = [_probe(figures, probe) for probe in figures["probes"]]
    return "\n\n".join([*paragraphs, "\n".join(_footnotes(figures))])


def _probe(figures: Figures, probe: dict[str, Any]) -> str:
    samples = figures["config"]["samples"]
    chance = "" if probe["chance"] is None else f", by chance {probe['chance']:.2g}"
    head = (
        f"{probe['probe']}: {_WORDS[probe['headline']]}, by {probe['axis']}, {samples} samples each{chance}"
    )
    rows: list[tuple[str, ...]] = [("", "length", *(f"{place:g}" for place in probe["places"]), "mean")]
    for run in figures["runs"]:
        for length in probe["lengths"]:
            shares = [
                cell[probe["headline"]]["estimate"]
                for cell in run["cells"]
                if cell["probe"] == probe["probe"] and cell["length"] == length
            ]
            cells = [f"{share:.2f}" for share in [*shares, sum(shares) / len(shares)]]
            rows.append((run["title"], f"{length:,}", *cells))
    return f"{head}\n\n{aligned(rows)}"


def _footnotes(figures: Figures) -> list[str]:
    lines = []
    for run in figures["runs"]:
        if run["pattern"] is not None:
            ran = ", ".join(f"{count:,} calls {name}" for name, count in run["ran"].items())
            lines.append(f"{run['title']}: density {run['density']:.1%}, {run['layers']} layers, {ran}")
    lines.append(
        "teacher-forced: an answer token is right where it is the first guess after the right ones before"
    )
    trained, longest = figures["config"]["trained_length"], max(figures["config"]["lengths"])
    if trained and longest > trained:
        lines.append(f"extrapolation: {longest:,} tokens are read, the model was trained on {trained:,}")
    return lines
