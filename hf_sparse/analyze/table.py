"""What an analysis found as lines of text: a row per pattern, and what the heads of each layer want."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from ..evaluate.table import WIDTH, Rows, aligned
from .candidates import SLACK
from .result import NEAR

if TYPE_CHECKING:
    from .result import Analysis


def table(analysis: Analysis) -> str:
    """Return what was found as lines of text, at most 120 characters wide."""
    paragraphs = [_heading(analysis), aligned(pattern_rows(analysis)), "\n".join(layer_lines(analysis))]
    notes = [_wrapped(note) for note in (*_explained(analysis), *analysis.notes)]
    return "\n\n".join(filter(None, [*paragraphs, "\n".join(notes)]))


def pattern_rows(analysis: Analysis) -> Rows:
    """Return a row of cells per pattern, the one that keeps most first; those that read more than asked for last."""
    comparable, means = analysis.comparable, analysis.mass.mean((1, 2))
    wanted_by, nearly_by = analysis.wanted_by, analysis.nearly_by
    rows: Rows = [("", "density", "mean mass", "worst head", "wanted by heads", f"within {NEAR}")]
    for number in sorted(range(len(means)), key=lambda number: (not comparable[number], -means[number])):
        mass = analysis.mass[number]
        row, head = np.unravel_index(mass.argmin(), mass.shape)
        worst = f"{mass.min():.3f} (layer {analysis.layers[row]} head {head})"
        heads = (f"{wanted_by[number]} of {mass.size}", str(nearly_by[number]))
        figures = (f"{analysis.densities[number]:.1%}", f"{means[number]:.3f}", worst)
        rows.append((analysis.labels[number], *figures, *(heads if comparable[number] else ("denser", ""))))
    return rows


def layer_lines(analysis: Analysis) -> list[str]:
    """Return for each layer which heads want which pattern; layers that want the same have one line."""
    lines = ["what each head wants"]
    texts = [_wants(row, analysis.names) for row in analysis.wanted]
    for text, group in groupby(zip(analysis.layers, texts, strict=True), key=lambda one: one[1]):
        layers = _runs([layer for layer, _ in group])
        lines.append(_wrapped(f"layer{'s' * (not layers.isdigit())} {layers}: {text}"))
    return lines


def _explained(analysis: Analysis) -> list[str]:
    """Return what one has to know to read the columns, a sentence each."""
    lines = [f"within {NEAR}: heads in which it keeps less than {NEAR} less than what they want"]
    if not analysis.comparable.all():
        lines.append(
            f"denser: reads more than {SLACK:g} times the density, so it is held against no other pattern"
        )
    return lines


def _wants(row: np.ndarray, names: Sequence[str]) -> str:
    """Return the patterns that the heads of a layer want, int [H], the most wanted first."""
    counts = Counter(row.tolist())
    if len(counts) == 1:
        return f"all {names[row[0]]}"
    order = sorted(counts, key=lambda number: (-counts[number], number))
    return "; ".join(
        f"{names[number]} {_runs([int(head) for head in np.flatnonzero(row == number)])}" for number in order
    )


def _runs(numbers: Sequence[int]) -> str:
    """Return ascending numbers as ``0-3, 6``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _heading(analysis: Analysis) -> str:
    config = analysis.config
    return _wrapped(
        f"the share of dense attention's mass that a pattern keeps, at a density of about {analysis.density:.1%}; "
        f"windows of {config['length']:,} tokens: {config['samples']} (of documents: {config['documents']}), queries "
        f"of each: {config['queries']:,}"
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
