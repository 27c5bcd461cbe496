"""What was measured as tables that a person reads: rows of cells, and the lines of text made of them."""

from __future__ import annotations

import math
import textwrap

from .bootstrap import LEAST_DOCUMENTS, Interval
from .figures import adapter_gaps, control_name
from .results import Result, Run

WIDTH = 120  # characters
_LEAST_TITLE = 28
_NAMED = 5  # skipped documents that are named

Rows = list[tuple[str, ...]]


def table(result: Result) -> str:
    """Return what was measured as lines of text, at most 120 characters wide."""
    paragraphs = [", ".join(heading(result)), aligned(quality_rows(result))]
    if result.contexts:
        targets, documents = result.config["context_targets"], int(result.on_curve.sum())
        paragraphs.append(
            f"perplexity of the last {targets:,} tokens of {_count(documents, 'document')}, by tokens of context\n"
            + aligned(context_rows(result))
        )
    paragraphs += [aligned(timing_rows(result)), "\n".join(map(_wrapped, footnotes(result)))]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def aligned(rows: Rows) -> str:
    """Return rows as lines: the first column to the left and wrapped where the line would grow too long."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = max(_LEAST_TITLE, WIDTH - sum(width + 2 for width in widths[1:]))
    titles = [textwrap.wrap(row[0], room, subsequent_indent="  ") or [""] for row in rows]
    first = max(len(line) for title in titles for line in title)
    lines = []
    for title, row in zip(titles, rows, strict=True):
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines += ["  ".join([title[0].ljust(first), *cells]).rstrip(), *title[1:]]
    return "\n".join(lines)


def heading(result: Result) -> list[str]:
    """Return in a few words what was scored and what was not."""
    text, config = result.text, result.config
    notes = [_count(len(text.documents), "document"), f"{text.tokens:,} tokens scored"]
    if config["mode"] != "full":
        step = f", {config['stride']:,} apart" if config["mode"] == "strided" else ""
        notes.append(f"{config['mode']} windows of {config['max_length']:,}{step}")
    if config["measure"] != "log-likelihood":
        notes.append(f"{config['measure']} of masked tokens")
    if text.truncated:
        notes.append(f"{text.truncated:,} cut off at {config['max_length']:,} tokens")
    if text.prefix == "none":
        notes.append("no BOS token: scored from token 2")
    return notes


def quality_rows(result: Result) -> Rows:
    """Return how good every run is, and what share of dense attention's pairs it computed."""
    rolling, keys = result.config["mode"] == "rolling", result.key_counts is not None
    head = ["", "ppl", "nats/token", "above dense [95 %]", "bits/byte"]
    head += ["word ppl", "byte ppl"] if rolling else []
    head += ["key ppl"] if keys else []
    rows = [(*head, "density")]
    for run in result.runs:
        cells = [
            run.title,
            figure_text(result.perplexity(run), 3),
            figure_text(result.nats_per_token(run), 4),
            difference_text(result, run),
            figure_text(result.bits_per_byte(run), 4),
        ]
        if rolling:
            cells += [
                figure_text(result.word_perplexity(run), 2),
                figure_text(result.byte_perplexity(run), 4),
            ]
        if keys:
            cells.append(figure_text(result.key_perplexity(run), 3))
        density = "?" if math.isnan(run.density) else f"{run.density:.1%}"
        rows.append((*cells, density))
    return rows


def context_rows(result: Result) -> Rows:
    """Return the perplexity of the same tokens by context."""
    rows: Rows = [("", *(f"{context:,}" for context in result.contexts))]
    for run in result.runs:
        losses = result.loss_by_context(run)
        rows.append((run.title, *(figure_text(math.exp(min(loss, 700)), 3) for loss in losses)))
    return rows


def timing_rows(result: Result) -> Rows:
    """Return how fast every run was and the memory it took; all but the bytes of the cache differs from run to run."""
    rows: Rows = [("", "tokens/s", "prefill", "KV", "peak memory")]
    for run in result.runs:
        speed = "?" if math.isnan(run.tokens_per_second) else f"{run.tokens_per_second:,.0f}"
        prefill = "?" if run.served is None else f"{run.served.seconds * 1000:,.0f} ms"
        held = memory_text(None if run.served is None else run.served.kv_bytes)
        rows.append((run.title, speed, prefill, held, memory_text(run.peak_memory)))
    return rows


def footnotes(result: Result) -> list[str]:
    """Return what one has to know to read the tables, a sentence each."""
    return [
        *_what_ran(result),
        *_adapters(result),
        *_what_was_scored(result),
        *_extrapolation(result),
        *_intervals(result),
        *_what_was_timed(result),
    ]


def difference_text(result: Result, run: Run) -> str:
    """Return nats/token above dense with the interval, nothing for a dense run."""
    dense = result.dense_of(run)
    return "" if run is dense else interval_text(result.difference(run, dense))


def interval_text(interval: Interval) -> str:
    """Return an estimate with its interval where it has one, "?" where it is unknown."""
    return "?" if math.isnan(interval.estimate) else str(interval).split(" (")[0]


def figure_text(value: float | None, digits: int) -> str:
    """Return a figure with so many digits, huge ones in powers of 10, and "?" for what is unknown."""
    if value is None or math.isnan(value):
        return "?"
    return f"{value:.{digits}f}" if abs(value) < 10**6 else f"{value:.2e}"


def memory_text(size: int | None) -> str:
    """Return bytes as mebibytes, a few as kibibytes."""
    if size is None:
        return "?"
    amount, unit = (size / 2**20, "MiB") if size >= 2**20 else (size / 2**10, "KiB")
    return f"{amount:,.0f} {unit}" if amount >= 100 else f"{amount:.3g} {unit}"


def _what_ran(result: Result) -> list[str]:
    """Return the operators that computed, each with the runs they computed for."""
    ran: dict[str, list[str]] = {}
    for run in result.runs:
        if run.sparse:
            calls = ", ".join(f"{count:,} calls {name}" for name, count in run.ran.items())
            ran.setdefault(f"{run.layers} layers, {calls}", []).append(run.title)
    lines = []
    for what, titles in ran.items():
        who = "every pattern" if len(ran) == 1 and len(titles) > 1 else "; ".join(titles)
        lines.append(f"ran: {who}: {what}")
    return lines


def _adapters(result: Result) -> list[str]:
    return [
        f"gap closed by the adapter, {label}: {gap}; above {control_name(result)}: {gap.residual} nats/token"
        for label, gap in adapter_gaps(result)
    ]


def _what_was_scored(result: Result) -> list[str]:
    lines = []
    if skipped := result.text.skipped:
        reasons = sorted({each.reason for each in skipped})
        names = ", ".join(f"{each.name!r}"[1:-1] for each in skipped[:_NAMED])
        more = f" and {len(skipped) - _NAMED:,} more" if len(skipped) > _NAMED else ""
        lines.append(f"skipped: {_count(len(skipped), 'document')} ({', '.join(reasons)}): {names}{more}")
    if result.key_counts is not None:
        lines.append(
            f"key ppl: of {int(result.key_counts.sum()):,} tokens that dense attention predicts well from the whole "
            f"context and badly from {result.config['key_tokens']:,} tokens"
        )
    return lines


def _extrapolation(result: Result) -> list[str]:
    trained = result.config["trained_length"]
    length = min(result.config["max_length"], max(len(document.ids) for document in result.text.documents))
    if not trained or length <= trained:
        return []
    return [f"extrapolation: {length:,} tokens are read at once, the model was trained on {trained:,}"]


def _intervals(result: Result) -> list[str]:
    compared = [run for run in result.runs if run is not result.dense_of(run)]
    if not compared:
        return []
    found = result.difference(compared[0], result.dense_of(compared[0]))
    documents = len(result.text.documents)
    why = f": fewer than {LEAST_DOCUMENTS} documents" if documents < LEAST_DOCUMENTS else ""
    return [f"intervals: paired bootstrap over {found.units} {found.unit}{why}"]


def _what_was_timed(result: Result) -> list[str]:
    lines = []
    served = [run.served for run in result.runs if run.served is not None]
    if served:
        lines.append(
            f"prefill, KV: time until a prompt of {served[0].tokens:,} tokens is in the cache, and its bytes"
        )
    if any(run.memory_since == "process" for run in result.runs):
        lines.append("peak memory: since the process began, as this system keeps one mark for all of it")
    return lines


def _wrapped(note: str) -> str:
    return textwrap.fill(note, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
