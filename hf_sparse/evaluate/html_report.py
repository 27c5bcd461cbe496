"""One page that holds a whole evaluation: tables, pictures, every document, and the proof that the patterns ran."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from .html_style import STYLE
from .method_text import method_sentences
from .pictures import QUALITY_AGAINST_SPEED
from .results import Result
from .table import context_rows, footnotes, heading, quality_rows, timing_rows

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # nothing from elsewhere, no scripts


@dataclass(frozen=True)
class Section:
    """A further part of the page: a heading, rows of cells of which the first is the head, and PNG pictures."""

    title: str
    rows: Sequence[Sequence[str]] = ()
    pictures: Sequence[bytes] = ()


def html_report(
    result: Result,
    pictures: dict[str, bytes],
    command: str | None = None,
    sections: Sequence[Section] = (),
) -> str:
    """Return the page. It needs no other file and no script, and everything from outside is escaped in it.

    All that may differ between two runs of the same evaluation is in the section with id "timing".

    Args:
        pictures: PNGs by the name of their file, as `pictures.draw_pictures` gives them.
        command: that made the result; without it the page says which arguments did.
        sections: put behind the evaluation's own tables.
    """
    config = result.config
    title = f"{config['model'] or config['architecture']}: dense and sparse attention"
    timing_picture = [pictures[name] for name in pictures if name == QUALITY_AGAINST_SPEED]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(', '.join(heading(result)))}.</p>",
        html_table(quality_rows(result)),
        _context(result),
        *(_picture(content, name) for name, content in pictures.items() if name != QUALITY_AGAINST_SPEED),
        _section("Speed and memory", _timing(result, timing_picture), "timing"),
        *(_further(section) for section in sections),
        _section(
            "Notes", "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in footnotes(result)) + "</ul>"
        ),
        _section("Method", f"<p>{escape(' '.join(method_sentences(result)))}</p>"),
        _section("What ran", _proof(result), "proof"),
        _section("Documents", _documents(result)),
        _section("Configuration", html_table(_named(config), head=False)),
        _section("Machine", html_table(_named(result.machine), head=False)),
        _section("How to make it again", _again(result, command)),
    ]
    body = "\n".join(part for part in parts if part)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def html_table(rows: Sequence[Sequence[str]], head: bool = True) -> str:
    """Return rows of plain text as a table, which scrolls by itself where it is wide."""
    lines = []
    for number, row in enumerate(rows):
        kind = "th" if head and number == 0 else "td"
        cells = (f"<{kind}>{escape(cell)}</{kind}>" for cell in row[1:])
        lines.append(f'<tr><th scope="row">{escape(row[0])}</th>{"".join(cells)}</tr>')
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _section(title: str, content: str, name: str = "") -> str:
    identity = f' id="{name}"' if name else ""
    return f"<section{identity}>\n<h2>{escape(title)}</h2>\n{content}\n</section>"


def _further(section: Section) -> str:
    shown = [html_table(section.rows)] if section.rows else []
    return _section(
        section.title, "\n".join([*shown, *(_picture(each, section.title) for each in section.pictures)])
    )


def _picture(content: bytes, name: str) -> str:
    text = name.removesuffix(".png").replace("_", " ")
    data = base64.b64encode(content).decode()
    return f'<figure><img alt="{escape(text)}" src="data:image/png;base64,{data}"></figure>'


def _context(result: Result) -> str:
    if not result.contexts:
        return ""
    targets, documents = result.config["context_targets"], int(result.on_curve.sum())
    caption = f"Perplexity of the last {targets:,} tokens of {documents:,} documents, by tokens of context:"
    return f"<p>{caption}</p>\n{html_table(context_rows(result))}"


def _timing(result: Result, pictures: Sequence[bytes]) -> str:
    words = "Timings and peak memory are of one run on this machine; they differ from run to run."
    shown = [_picture(each, QUALITY_AGAINST_SPEED) for each in pictures]
    return "\n".join([html_table(timing_rows(result)), *shown, f"<p>{words}</p>"])


def _proof(result: Result) -> str:
    rows = [("", "layers", "attention calls", "backend/operator", "pairs computed, of dense")]
    for run in result.runs:
        if run.sparse:
            ran = ", ".join(f"{name} {count:,}" for name, count in run.ran.items())
            rows.append((run.title, str(run.layers), f"{run.calls:,}", ran, f"{run.density:.4%}"))
    if len(rows) == 1:
        return "<p>No pattern was measured: every attention call was the model's own.</p>"
    words = "Counted while the figures above were made, in the calls themselves: a run without a sparse call fails."
    return f"<p>{words}</p>\n{html_table(rows)}"


def _documents(result: Result) -> str:
    """Return a row per document: the nats of every run that is held against none, and what each other one adds."""
    rows = [("document", "tokens", *(_column(result, run) for run in result.runs))]
    for i, document in enumerate(result.text.documents):
        cells = []
        for run in result.runs:
            dense = result.dense_of(run)
            nats = run.nats[i] if run is dense else run.nats[i] - dense.nats[i]
            cells.append(
                f"{nats / document.tokens:.4f}" if run is dense else f"{nats / document.tokens:+.4f}"
            )
        rows.append((document.name, f"{document.tokens:,}", *cells))
    measured = "every run"
    if any(run is not result.dense_of(run) for run in result.runs):
        measured = "dense attention, and what each pattern adds to it"
    summary = f"{len(rows) - 1:,} documents: nats/token of {measured}"
    skipped = "".join(f"<li>{escape(each.name)}: {escape(each.reason)}</li>" for each in result.text.skipped)
    more = f"<details><summary>{len(result.text.skipped):,} skipped</summary><ul>{skipped}</ul></details>"
    shown = f"<details><summary>{summary}</summary>\n{html_table(rows)}\n</details>"
    return shown + (f"\n{more}" if skipped else "")


def _column(result: Result, run: Any) -> str:
    return run.title if run is result.dense_of(run) else f"{run.title} less {result.dense_of(run).title}"


def _named(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Return names with their values, those inside a section spelled section.name."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += [(f"{name}.{inner}", shown) for inner, shown in _named(value)]
        else:
            rows.append((name, "none" if value in (None, "", []) else str(value)))
    return rows


def _again(result: Result, command: str | None) -> str:
    revision = result.machine.get("git_revision")
    where = f" at revision {revision}" if revision else ""
    version = result.machine["versions"]["hf_sparse"]
    text = f"fingerprint of the scored tokens {result.text.fingerprint}"
    lead = f"<p>hf_sparse {escape(str(version))}{escape(where)}; {escape(text)}.</p>"
    if command:
        return f"{lead}\n<pre>{escape(command)}</pre>"
    return f"{lead}\n<p>hf_sparse.evaluate.perplexity with the arguments under Configuration.</p>"
