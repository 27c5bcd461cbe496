"""What a calibration found as lines of text: the frontier, where each candidate runs, and why."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator, Sequence

import numpy as np

from ..evaluate.table import WIDTH, Rows, aligned, figure_text, memory_text
from .costs import MEASURES
from .gated import DENSE
from .result import Calibration, Point

VALUE_NAMES = {"loss": "nats/token", "kl": "KL to dense"}  # by objective
_MARKS = "123456789abcdefghijklmnopqrstuvwxyz"
_MOST_DRAWN = (128, 100)  # layers, and units of each, up to which the choice is drawn
_MOST_NAMED = 10


def table(result: Calibration) -> str:
    """Return what was found as lines of text, at most 120 characters wide."""
    paragraphs = [
        _heading(result),
        aligned(frontier_rows(result)),
        _candidates(result),
        _drawn(result),
        _reasons(result),
        _spent(result),
    ]
    return "\n\n".join(filter(None, paragraphs))


def frontier_rows(result: Calibration) -> Rows:
    """Return the frontier, and below it the candidates that are not on it in all units, as rows of cells."""
    measure, value = result.costs.measure, VALUE_NAMES[result.config["objective"]]
    cost = ["pairs"] if measure == "density" else [measure, "density"]
    head = ["% of dense", *cost, value, "above dense", "gap closed"]
    rows: Rows = [("", *head, *_marks(result))]
    for title, _, point in points(result):
        chosen = (point.choice == result.chosen.choice).all()
        rows.append(_row(result, point, title + (" <- chosen" if chosen else "")))
    return rows


def points(result: Calibration) -> Iterator[tuple[str, bool, Point]]:
    """Yield a title, True and the point for the frontier; then, with False, the candidates that are not on it."""
    on_it = [point.choice for point in result.frontier]
    for point in result.frontier:
        yield ("dense" if (point.choice == DENSE).all() else point.label), True, point
    for point in result.uniform:
        if not any((point.choice == choice).all() for choice in on_it):
            yield f"{point.label} everywhere", False, point


def titles(candidates: Sequence[str]) -> list[str]:
    """Return what the candidates are called, dense first."""
    return ["dense", *candidates[1:]]


def symbols(candidates: int, cheapest: int) -> list[str]:
    """Return a character for each candidate: # for dense, a dot for the cheapest, the others are numbered."""
    others = itertools.cycle(_MARKS)
    return [
        "#" if number == DENSE else "." if number == cheapest else next(others)
        for number in range(candidates)
    ]


def most_frequent(choice: np.ndarray) -> int:
    """Return the candidate that most units of a choice [L, U] run."""
    return int(np.bincount(choice.flatten()).argmax())


def units_of_each(choice: np.ndarray, candidates: int) -> list[int]:
    """Return how many units of a choice [L, U] run each candidate."""
    return [int(count) for count in np.bincount(choice.flatten(), minlength=candidates)]


def _row(result: Calibration, point: Point, title: str) -> tuple[str, ...]:
    costs, closed = result.costs, result.closed(point)
    density = [] if costs.measure == "density" else [f"{point.density:.3f}"]
    return (
        title,
        f"{point.cost:.1%}",
        _amount(costs.measure, point.cost * costs.dense),
        *density,
        figure_text(point.value, 4),
        f"{point.value - result.dense.value:+.4f}",
        "?" if closed is None else f"{closed:.1%}",
        *map(str, units_of_each(point.choice, len(result.candidates))),
    )


def _amount(measure: str, amount: float) -> str:
    """Return a cost in its own unit."""
    if measure == "kv_bytes":
        return memory_text(round(amount))
    if measure == "density":
        return _large(amount)
    return f"{amount * 1000:.3g} ms"


def _large(amount: float) -> str:
    """Return a number of pairs in three digits: 941, 25.2M, 1.07T."""
    letters = iter(("", "k", "M", "G", "T", "P"))
    letter = next(letters)
    while amount >= 999.5:
        amount, letter = amount / 1000, next(letters)
    return f"{amount:.3g}{letter}"


def _heading(result: Calibration) -> str:
    layers, count = result.units.shape
    config, costs = result.config, result.costs
    what = "" if result.units.kind == "layer" else f" x {count} {result.units.kind.replace('_', '-')}s"
    return _wrapped(
        f"{layers} layers{what}, measured on {config['samples']} windows of {config['length']:,} tokens; budget "
        f"{result.budget:g} of dense ({_amount(costs.measure, costs.dense)}) in {MEASURES[costs.measure]} at "
        f"{costs.tokens:,} tokens ({costs.measure})"
    )


def _candidates(result: Calibration) -> str:
    """Return what the last columns of the frontier count and the characters of the drawing are."""
    names = titles([str(candidate) for candidate in result.candidates])
    return "units that run\n" + "\n".join(
        f"  {mark}  {name}" for mark, name in zip(_marks(result), names, strict=True)
    )


def _marks(result: Calibration) -> list[str]:
    return symbols(len(result.candidates), most_frequent(result.cheapest.choice))


def _drawn(result: Calibration) -> str:
    """Return the choice as a line per layer with a character per unit, nothing where it is too large."""
    choice = result.chosen.choice
    if choice.shape[0] > _MOST_DRAWN[0] or choice.shape[1] > _MOST_DRAWN[1]:
        return ""
    marks = _marks(result)
    if result.units.kind == "layer":
        return f"layers {result.units.layers[0]} to {result.units.layers[-1]}: " + _line(choice[:, 0], marks)
    numbers = [f"layer {layer}" for layer in result.units.layers]
    wide = max(map(len, numbers))
    return "\n".join(
        f"{number:<{wide}}  {_line(row, marks)}" for number, row in zip(numbers, choice, strict=True)
    )


def _line(row: np.ndarray, marks: Sequence[str]) -> str:
    return "".join(marks[number] for number in row)


def _reasons(result: Calibration) -> str:
    """Return the units that were changed and gained most, by what the score said of each alone."""
    choice = result.chosen.choice
    changed = np.argwhere(choice != result.cheapest.choice).tolist()
    if not changed:
        return "no unit was changed: the budget is that of the cheapest choice, or nothing gains"
    gain = {(layer, unit): result.gains[layer, unit, choice[layer, unit]] for layer, unit in changed}
    first = sorted(gain, key=lambda place: -gain[place])[:_MOST_NAMED]
    names = titles([str(candidate) for candidate in result.candidates])
    wide = max(len(result.units.name(*place)) for place in first)
    rows: Rows = [("what gains most", "gain alone")]
    for layer, unit in first:
        title = f"{result.units.name(layer, unit):<{wide}}  {names[choice[layer, unit]]}"
        rows.append((title, f"{gain[layer, unit]:.3g}"))
    more = f"\nand {len(changed) - len(first)} more" if len(changed) > len(first) else ""
    return aligned(rows) + more


def _spent(result: Calibration) -> str:
    config = result.config
    return _wrapped(
        f"spent: {result.passes:g} forward passes (a backward pass is 2), {result.choosing:g} of them to choose, over "
        f"each of {config['samples']} windows, of {config['documents']} texts; score {config['score']}"
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
