"""Results read back from disk: results.json, and the rows beside it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .bootstrap import BLOCK_TOKENS, LEAST_DOCUMENTS
from .figures import FORMAT
from .report import RESULTS_FILE
from .rows import Row

ROWS = "per_document.jsonl"
_NEEDED_OF_ROWS = {"run", "document", "tokens", "nats", "block_nats"}
_NEEDED = {  # what is read of each section
    "config": {
        "model",
        "architecture",
        "dtype",
        "mode",
        "max_length",
        "stride",
        "bos_each_window",
        "measure",
        "seed",
    },
    "text": {"documents", "tokens", "bytes", "fingerprint"},
    "machine": {"device"},
    "runs": {
        "title",
        "nats_per_token",
        "perplexity",
        "bits_per_byte",
        "word_perplexity",
        "byte_perplexity",
        "density",
    },
}


@dataclass(frozen=True, eq=False)
class SavedResult:
    """One evaluation on disk.

    path: of its results.json; figures: its content, see `figures.as_json`.
    rows: of every run, in the order of the documents; None where per_document.jsonl does not lie beside it.
    """

    path: Path
    figures: dict[str, Any]
    rows: dict[str, list[Row]] | None

    def units(self, title: str) -> tuple[np.ndarray, np.ndarray, str]:
        """Return what is drawn of a run: nats per unit, tokens per unit, and what a unit is."""
        assert self.rows is not None
        rows = self.rows[title]
        if len(rows) >= LEAST_DOCUMENTS:
            nats, tokens = [row["nats"] for row in rows], [row["tokens"] for row in rows]
            return np.array(nats), np.array(tokens), "documents"
        blocks = [np.diff([*range(0, row["tokens"], BLOCK_TOKENS), row["tokens"]]) for row in rows]
        nats = [nats for row in rows for nats in row["block_nats"]]
        return np.array(nats), np.concatenate(blocks), f"blocks of {BLOCK_TOKENS} tokens"


def read_results(wanted: str | os.PathLike[str]) -> SavedResult:
    """Return the evaluation in a results.json, or in the folder that holds one.

    Raises:
        ValueError: no such file, a file that is damaged, none of ours or of another version, or rows beside it that
            are not of these results.
    """
    path = Path(wanted)
    if path.is_dir():
        path = path / RESULTS_FILE
    figures = _read_json(path)
    if not isinstance(figures, dict) or "runs" not in figures:
        raise ValueError(f"{path} holds no results of hf-sparse eval; name a {RESULTS_FILE}, or its folder.")
    if (found := figures.get("format")) != FORMAT:  # the first one did not say
        raise ValueError(
            f"{path} was written by another version (format {found!r}, this one reads {FORMAT}); measure again."
        )
    if missing := _missing(figures):
        raise ValueError(f"{path} is damaged: it lacks {', '.join(missing)}; measure again.")
    rows = path.parent / ROWS
    return SavedResult(path, figures, _read_rows(rows, figures) if rows.exists() else None)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ValueError(
            f"{path} cannot be read ({reason}); name a {RESULTS_FILE} of hf-sparse eval, or its folder."
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged or no JSON ({error}); measure again.") from None


def _missing(figures: dict[str, Any]) -> list[str]:
    """Return what should be in the file and is not."""
    found = []
    for section, names in _NEEDED.items():
        content = figures.get(section)
        for part in content if isinstance(content, list) and content else [content]:
            known = part.keys() if isinstance(part, dict) else set()
            found += [f"{section}.{name}" for name in sorted(names - known)]
    return found


def _read_rows(path: Path, figures: dict[str, Any]) -> dict[str, list[Row]]:
    """Return the rows of each run; raise ValueError where they are not those that `figures` were made of."""
    found: dict[str, list[Row]] = {run["title"]: [] for run in figures["runs"]}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not (isinstance(row, dict) and row.keys() >= _NEEDED_OF_ROWS):
            raise ValueError(f"{path}, line {number} is damaged; measure again.")
        if row["run"] not in found:
            raise ValueError(f"{path}, line {number} is of no run in {RESULTS_FILE}; measure again.")
        found[row["run"]].append(row)
    for run in figures["runs"]:
        rows = sorted(found[run["title"]], key=lambda row: row["document"])
        tokens, nats = sum(row["tokens"] for row in rows), sum(row["nats"] for row in rows)
        documents = [row["document"] for row in rows]
        stated = run["nats_per_token"]  # null where a document's nats are not finite
        agrees = stated is None or bool(np.isclose(nats, stated * tokens, rtol=1e-9))
        whole = documents == list(range(figures["text"]["documents"]))
        if not (whole and tokens == figures["text"]["tokens"] and agrees):
            raise ValueError(
                f"{path} does not belong to {RESULTS_FILE}: the rows of {run['title']} give other sums; measure again."
            )
        found[run["title"]] = rows
    return found
