"""The report of `compare_patterns.py`: a page, a CSV file and pictures, all made of comparison.json alone."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from compare_patterns_pictures import draw_memory, draw_operators, draw_quality_against_speed
from compare_patterns_rows import BROKEN, Row, rows_of
from compare_patterns_tables import UNMEASURED, choices, length_title, patterns, ran, table

from hf_sparse.evaluate.csv_files import as_csv
from hf_sparse.evaluate.html_report import html_table
from hf_sparse.evaluate.html_style import STYLE
from hf_sparse.evaluate.output_folder import write_atomically
from hf_sparse.evaluate.pictures.loss_by_position import loss_by_position
from hf_sparse.evaluate.plot import FARTHEST

FORMAT = 1  # of comparison.json
AGAINST_SPEED = "quality_against_speed.png"


def save_report(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write report.html, comparison.csv and the pictures into `folder`; return their paths.

    Raises:
        ValueError: matplotlib is missing.
    """
    lengths = sorted(int(n) for n in record["lengths"])
    by_length = {n: rows_of(record, n) for n in lengths}
    trained = record["settings"]["trained_length"]
    measured = {key for rows in by_length.values() for row in rows for key in row if row[key] is not None}
    pictures = {}
    if measured >= {"nats_above_dense", "prompt_times"}:
        pictures[AGAINST_SPEED] = draw_quality_against_speed(by_length, trained)
    if "forward_times" in measured:
        pictures["operators.png"] = draw_operators(by_length)
    if "kv_bytes" in measured:
        pictures["memory.png"] = draw_memory(by_length)
    for n in lengths[-1:]:
        if figures := record["lengths"][str(n)]["quality"]:
            pictures[f"loss_by_position_{n}.png"] = loss_by_position(_shown(record, figures))
    files = {
        "report.html": _page(record, by_length, pictures).encode(),
        "comparison.csv": as_csv([row for rows in by_length.values() for row in rows]).encode(),
        **pictures,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def _shown(record: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    """Return the figures with the short names of the patterns, without those that lost more than the scale shows."""
    labels = {title: label for label, title in record["settings"]["titles"].items()}
    runs = [
        run | {"title": labels.get(run["title"], run["title"])}
        for run in figures["runs"]
        if run["pattern"] is None or (run["nats_above_dense"]["estimate"] or 0) <= FARTHEST
    ]
    return figures | {"runs": runs}


def _page(record: dict[str, Any], by_length: dict[int, list[Row]], pictures: dict[str, bytes]) -> str:
    settings = record["settings"]
    title = f"{settings['model']}: what each pattern costs and saves"
    parts = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(line)}</p>" for line in _lead(record, by_length))]
    parts += ["<h2>Which pattern to take</h2>", html_table(choices(by_length)), *_advice(by_length)]
    if AGAINST_SPEED in pictures:
        parts.append(_picture(AGAINST_SPEED, pictures))
    for rows in by_length.values():
        parts += [
            f"<h2>{escape(length_title(rows))}</h2>",
            html_table(table(rows)),
            _list(_of_length(record, rows)),
        ]
    for name, heading in (("operators.png", "One attention call"), ("memory.png", "Memory")):
        if name in pictures:
            parts += [f"<h2>{heading}</h2>", _picture(name, pictures)]
    for name in pictures:
        if name.startswith("loss_by_position"):
            parts += ["<h2>Loss by position</h2>", _picture(name, pictures)]
    parts += ["<h2>How it was measured</h2>", _list(_method(record))]
    parts += ["<h2>The patterns</h2>", html_table(patterns(by_length))]
    parts += ["<h2>What ran</h2>", html_table(ran(record))]
    if record["not_measured"]:
        parts += ["<h2>Not measured</h2>", _list(record["not_measured"])]
    machine = settings["machine"]
    named = [*machine.items(), *machine["versions"].items(), ("git revision", record["git_revision"])]
    named = [*named, ("date", record["date"]), ("checksum of the library", settings["code"])]
    cells = [(name, str(value)) for name, value in named if name != "versions"]
    parts += ["<h2>Machine</h2>", html_table(cells, head=False)]
    parts += ["<h2>How to make it again</h2>", f"<pre>{escape(record['command'])}</pre>"]
    return _HTML.format(title=escape(title), style=STYLE, body="\n".join(parts))


_HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _lead(record: dict[str, Any], by_length: dict[int, list[Row]]) -> list[str]:
    machine, settings = record["settings"]["machine"], record["settings"]
    versions = machine["versions"]
    lines = [
        f"{len(settings['titles'])} patterns against dense attention on the same tokens, nothing trained. "
        f"{machine['processor']}, {machine['threads']} threads, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, {record['date']}."
    ]
    beyond = [n for n, rows in by_length.items() if rows[0]["extrapolation"]]
    if beyond:
        lengths = " and ".join(f"{n:,}" for n in beyond)
        lines.append(
            f"The model was trained on texts of up to {settings['trained_length']:,} tokens: what is said of "
            f"quality at {lengths} is extrapolation, for dense attention too."
        )
    return lines


def _advice(by_length: dict[int, list[Row]]) -> list[str]:
    """Return what the first table leaves open, a paragraph each."""
    lines = [
        "The fastest pattern for reading a prompt whose loss stays within each bound; times are against dense "
        "attention in the same run."
    ]
    for rows in by_length.values():
        broken = [row for row in rows if (row["nats_above_dense"] or 0) > BROKEN]
        if broken:
            named = ", ".join(f"{row['pattern']} ({row['nats_above_dense']:+.1f})" for row in broken)
            lines.append(
                f"Of no use to this model untrained, {length_title(rows)}, nats/token above dense: {named}."
            )
    return [f"<p>{escape(line)}</p>" for line in lines]


def _of_length(record: dict[str, Any], rows: list[Row]) -> list[str]:
    lines = ["* faster than dense attention and than every pattern that loses less"]
    quality = record["lengths"][str(rows[0]["length"])]["quality"]
    if quality:
        text = quality["text"]
        lines.append(f"documents: {text['documents']}; tokens scored: {text['tokens']:,}")
        units = {row["interval_unit"] for row in rows if row["interval_unit"]}
        lines += [f"intervals: paired bootstrap over {unit}" for unit in sorted(units)]
    if rows[0]["extrapolation"]:
        lines.append(
            f"extrapolation: the model was trained on {record['settings']['trained_length']:,} tokens"
        )
    return lines


def _method(record: dict[str, Any]) -> list[str]:
    repeats = record["settings"]["repeats"]
    return [
        "Options are chosen so that most patterns see 250 to 500 keys per query at 8,192 tokens, the mean over all "
        "queries as counted while the quality was measured; windows of other sizes show what more or fewer keys are "
        "worth, and layered has dense layers. full is dense attention and has no row.",
        "Quality: held-out documents of at least the length, each read in one pass up to it. Other lengths have other "
        "documents, so perplexities are compared within a table, not between tables.",
        f"Prompt: one forward pass that fills the cache, the fastest of {repeats} rounds in which all take turns. "
        "Memory: the most held above the loaded model meanwhile. KV cache: keys and values held after a prompt of that "
        "length.",
        f"Operator: one attention call, 8 heads x 64, float32, random tensors, the median of {repeats + 1} rounds in "
        "which all take turns; every pattern is checked against its definition there. Limit: pairs of dense attention "
        "over those of the pattern. Memory: beyond query, key, value and the gradient of the output; each call in a "
        "process of its own.",
        "layered, rerope and self-extend have no row of one attention call: their layers differ, or far keys are "
        "scored at other distances. In the names the union is window-256|strided-16.",
        f"{UNMEASURED}: not measured, or not applicable.",
    ]


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _picture(name: str, pictures: dict[str, bytes]) -> str:
    words = name.removesuffix(".png").replace("_", " ")
    data = base64.b64encode(pictures[name]).decode()
    return f'<figure><img alt="{escape(words)}" src="data:image/png;base64,{data}"></figure>'
