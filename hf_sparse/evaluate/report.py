"""Results on disk: every figure, every sum, tables, pictures and a page to read."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from .csv_files import csv_files
from .figures import as_json
from .html_report import Section, html_report
from .journal import IDENTITY
from .output_folder import write_folder
from .perplexity import ROWS_FILE
from .pictures import draw_pictures
from .results import Result

RESULTS_FILE = "results.json"
HTML_FILE = "report.html"


def save_results(
    result: Result,
    folder: str | os.PathLike[str],
    *,
    pictures: bool = False,
    html: bool = False,
    command: str | None = None,
    sections: Sequence[Section] = (),
) -> list[Path]:
    """Write the evaluation into `folder`, and return the paths of the files, results.json first.

    results.json has every figure, per_document.jsonl every sum, evaluation.json what was measured; results.csv,
    curves.csv and timing.csv are for spreadsheets. Each file appears whole or not at all and replaces one of its name.

    Args:
        pictures: also write the PNGs of `pictures.draw_pictures`.
        html: also write report.html, which holds the pictures too.
        command: that made the result, for report.html.
        sections: further parts of report.html.
    Raises:
        ValueError: pictures or html without matplotlib; nothing is written then.
    """
    figures = as_json(result)
    drawn = draw_pictures(figures) if pictures or html else {}
    files: dict[str, bytes] = {
        IDENTITY: (json.dumps(result.identity, indent=2) + "\n").encode(),
        f"{ROWS_FILE}.jsonl": "".join(json.dumps(row) + "\n" for row in result.rows).encode(),
        **{name: content.encode() for name, content in csv_files(figures).items()},
        **(drawn if pictures else {}),
    }
    if html:
        files[HTML_FILE] = html_report(result, drawn, command, sections).encode("utf-8", "replace")
    files[RESULTS_FILE] = (json.dumps(figures, indent=2) + "\n").encode()  # last: where it is, all is
    *others, results_file = write_folder(Path(folder), files)
    return [results_file, *others]
