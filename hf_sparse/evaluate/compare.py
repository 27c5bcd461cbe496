"""Evaluations side by side: what each run costs against the first evaluation, where both scored the same tokens."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .bootstrap import Interval, difference
from .csv_files import as_csv, interval_columns
from .figures import clean
from .saved_results import SavedResult, read_results
from .table import Rows, aligned, figure_text, interval_text

FORMAT = 1  # of what `Comparison.as_json` returns

# What must agree for two losses of the same tokens to be comparable: what each token was predicted from.
_CONDITIONS = ("mode", "max_length", "stride", "bos_each_window", "measure")
_ALSO_OF_MASKED = ("mask_share", "seed")
_FIGURES = ("nats_per_token", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "density")


@dataclass(frozen=True)
class Compared:
    """One run of one evaluation.

    number: of the evaluation, from 1; figures: the run in results.json.
    above_first: nats/token above the first run of the first evaluation; above_same: above the run of the same title
        there. None for a run against itself, where there is no such run, or where the tokens are not the same; without
        ends where the rows of one of the two are missing.
    """

    number: int
    figures: dict[str, Any]
    above_first: Interval | None
    above_same: Interval | None

    @property
    def title(self) -> str:
        return f"[{self.number}] {self.figures['title']}"


@dataclass(frozen=True)
class Comparison:
    """Evaluations side by side.

    reasons: why losses per token cannot be compared; none where they can.
    """

    evaluations: tuple[SavedResult, ...]
    runs: tuple[Compared, ...]
    reasons: tuple[str, ...]

    @property
    def comparable(self) -> bool:
        return not self.reasons

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "format": FORMAT,
            "comparable": self.comparable,
            "reasons": list(self.reasons),
            "evaluations": [
                {
                    "path": str(saved.path),
                    **{name: saved.figures[name] for name in ("config", "text", "machine")},
                }
                for saved in self.evaluations
            ],
            "runs": [
                {
                    "evaluation": run.number,
                    "title": run.figures["title"],
                    **{name: run.figures[name] for name in self._shown()},
                    "above_first": _as_json(run.above_first),
                    "above_same": _as_json(run.above_same),
                }
                for run in self.runs
            ],
        }

    def as_csv(self) -> str:
        """Return a header and a line per run."""
        rows = []
        for run in self.runs:
            saved = self.evaluations[run.number - 1]
            row = {"evaluation": run.number, "path": str(saved.path), "run": run.figures["title"]}
            row |= {name: run.figures[name] for name in self._shown()}
            row |= interval_columns("above_first", _as_json(run.above_first))
            row |= interval_columns("above_same", _as_json(run.above_same))
            rows.append(row)
        return as_csv(rows)

    def table(self) -> str:
        """Return the comparison as lines of text."""
        names = [_described(number, saved) for number, saved in enumerate(self.evaluations, 1)]
        rows = self._token_rows() if self.comparable else self._text_rows()
        return "\n\n".join(["\n".join(names), aligned(rows), "\n".join(self._notes())]).rstrip()

    def _shown(self) -> tuple[str, ...]:
        """Return the figures that may stand side by side."""
        per_token = ("nats_per_token", "perplexity")
        return tuple(name for name in _FIGURES if self.comparable or name not in per_token)

    def _token_rows(self) -> Rows:
        first = f"above [1] {self.runs[0].figures['title']} [95 %]"
        rows: Rows = [("", "ppl", first, "above same run of [1]", "bits/byte", "density")]
        for run in self.runs:
            above = (_interval(run.above_first), _interval(run.above_same))
            rows.append((run.title, figure_text(run.figures["perplexity"], 3), *above, *_ending(run)))
        return rows

    def _text_rows(self) -> Rows:
        rows: Rows = [("", "word ppl", "byte ppl", "bits/byte", "density")]
        for run in self.runs:
            cells = (
                figure_text(run.figures["word_perplexity"], 2),
                figure_text(run.figures["byte_perplexity"], 4),
            )
            rows.append((run.title, *cells, *_ending(run)))
        return rows

    def _notes(self) -> list[str]:
        if self.reasons:
            lines = ["not the same tokens under the same conditions, so losses per token are not compared:"]
            lines += [f"  {reason}" for reason in self.reasons]
            if len({saved.figures["text"]["bytes"] for saved in self.evaluations}) > 1:
                lines.append("the scored texts differ too: bits/byte and word ppl are of other texts in each")
            return lines
        lines = []
        if bare := [str(saved.path) for saved in self.evaluations if saved.rows is None]:
            lines.append(
                f"no intervals with these, as per_document.jsonl is not beside them: {', '.join(bare)}"
            )
        known = [
            run.above_first for run in self.runs if run.above_first is not None and run.above_first.units
        ]
        if known:
            lines.append(f"intervals: paired bootstrap over {known[0].units} {known[0].unit}")
        return lines


def compare(wanted: Sequence[str | os.PathLike[str]]) -> Comparison:
    """Hold evaluations against the first of them; each is a results.json or a folder with one.

    Where all scored the same tokens under the same conditions (mode, length), by whatever model, every run gets its
    paired difference to the first one's; the intervals come from the rows beside the files.

    Raises:
        ValueError: fewer than two, one named twice, or one that `read_results` refuses.
    """
    if len(wanted) < 2:
        raise ValueError(f"there is nothing to compare: name at least two results, got {len(wanted)}.")
    evaluations = tuple(read_results(each) for each in wanted)
    places = [saved.path.resolve() for saved in evaluations]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise ValueError(f"{evaluations[i].path} is named twice; name every evaluation once.")
    reasons = tuple(
        reason
        for number, saved in enumerate(evaluations[1:], 2)
        for reason in _reasons(evaluations[0], saved, number)
    )
    runs = []
    for number, saved in enumerate(evaluations, 1):
        for figures in saved.figures["runs"]:
            found = (None, None) if reasons else _differences(evaluations[0], saved, figures["title"])
            runs.append(Compared(number, figures, *found))
    return Comparison(evaluations, tuple(runs), reasons)


def _reasons(first: SavedResult, other: SavedResult, number: int) -> list[str]:
    """Return what keeps losses per token from being compared."""
    one, two = first.figures, other.figures
    found = []
    if one["text"]["fingerprint"] != two["text"]["fingerprint"]:
        found.append(
            f"[{number}] scored other tokens: {two['text']['tokens']:,} of {two['text']['documents']:,} documents, "
            f"[1] {one['text']['tokens']:,} of {one['text']['documents']:,}"
        )
    masked = "pseudo-log-likelihood" in (one["config"]["measure"], two["config"]["measure"])
    for name in (*_CONDITIONS, *(_ALSO_OF_MASKED if masked else ())):
        if one["config"][name] != two["config"][name]:
            found.append(f"[{number}] has {name} {two['config'][name]}, [1] {one['config'][name]}")
    return found


def _differences(
    first: SavedResult, other: SavedResult, title: str
) -> tuple[Interval | None, Interval | None]:
    titles = [run["title"] for run in first.figures["runs"]]
    start = None if other is first and title == titles[0] else _difference(other, title, first, titles[0])
    same = _difference(other, title, first, title) if other is not first and title in titles else None
    return start, same


def _difference(saved: SavedResult, title: str, first: SavedResult, against: str) -> Interval:
    """Return nats/token of a run above another, without an interval where rows are missing."""
    if saved.rows is None or first.rows is None:
        a, b = (_run(one, name)["nats_per_token"] for one, name in ((saved, title), (first, against)))
        unknown = float("nan")
        return Interval(unknown if None in (a, b) else a - b, unknown, unknown, "", 0)
    (a, tokens, unit), (b, _, _) = saved.units(title), first.units(against)
    return difference(a, b, tokens, unit, first.figures["config"]["seed"])


def _run(saved: SavedResult, title: str) -> dict[str, Any]:
    return next(run for run in saved.figures["runs"] if run["title"] == title)


def _described(number: int, saved: SavedResult) -> str:
    config, text = saved.figures["config"], saved.figures["text"]
    words = [config["model"] or config["architecture"], config["dtype"], saved.figures["machine"]["device"]]
    scored = f"{text['documents']:,} documents, {text['tokens']:,} tokens scored"
    mode = "" if config["mode"] == "full" else f", {config['mode']}"
    return f"[{number}] {saved.path}: {', '.join(words)}, length {config['max_length']:,}{mode}, {scored}"


def _ending(run: Compared) -> tuple[str, str]:
    density = run.figures["density"]
    return figure_text(run.figures["bits_per_byte"], 4), "?" if density is None else f"{density:.1%}"


def _interval(interval: Interval | None) -> str:
    return "" if interval is None else interval_text(interval)


def _as_json(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    found: dict[str, Any] = clean(dataclasses.asdict(interval))
    return found
