"""The figures of results.json as CSV files for a spreadsheet or a data frame."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

_RUN = ("adapter", "held_against")
_QUALITY = (
    "nats_per_token",
    "perplexity",
    "word_perplexity",
    "byte_perplexity",
    "bits_per_byte",
    "macro_perplexity",
    "key_perplexity",
    "key_tokens",
)
_DIFFERENCES = ("nats_above_dense", "bits_per_byte_above_dense")
_ENDS = ("low", "high", "unit", "units")
_PROOF = ("density", "calls", "layers")
_CURVE = ("run", "curve", "x", "tokens", "nats_per_token", "above_dense", "low", "high")


def csv_files(figures: dict[str, Any]) -> dict[str, str]:
    """Return results.csv (a row per run), curves.csv (a row per run and point) and timing.csv, by their names.

    Only timing.csv differs between two runs of the same evaluation. Columns: those of results.json, an interval spread
    over NAME, NAME_low, NAME_high, NAME_unit, NAME_units. `x` of curves.csv counts tokens: of a "position" the fewest
    tokens before those scored (up to twice as many), of a "context" all that is seen.
    """
    timing = [{"run": title, **each} for title, each in figures["timing"].items()]
    return {
        "results.csv": as_csv([_run(figures, run) for run in figures["runs"]]),
        "curves.csv": as_csv([point for run in figures["runs"] for point in _points(run)], _CURVE),
        "timing.csv": as_csv(timing),
    }


def as_csv(rows: Sequence[dict[str, Any]], columns: Sequence[str] = ()) -> str:
    """Return a header and a line per row; numbers keep all digits, and what is missing is empty.

    Args:
        columns: those of the first row where none are named.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def interval_columns(name: str, interval: dict[str, Any] | None) -> dict[str, Any]:
    """Return the columns of an interval, empty where there is none."""
    found = interval or {}
    return {name: found.get("estimate"), **{f"{name}_{end}": found.get(end) for end in _ENDS}}


def _run(figures: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    config, text, cache = figures["config"], figures["text"], run["kv_cache"] or {}
    row = {"run": run["title"], **{name: run[name] for name in (*_RUN, *_QUALITY)}}
    for name in _DIFFERENCES:
        row |= interval_columns(name, run[name])
    row |= {name: run[name] for name in _PROOF}
    row["ran"] = "; ".join(f"{name} {count}" for name, count in run["ran"].items())
    row |= {"kv_tokens": cache.get("tokens"), "kv_bytes": cache.get("bytes")}
    row |= {name: text[name] for name in ("documents", "tokens", "bytes", "words")}
    return row | {name: config[name] for name in ("model", "mode", "max_length")}


def _points(run: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for curve, points in (("position", run["loss_by_position"]), ("context", run["loss_by_context"])):
        for point in points:
            if not point["tokens"]:
                continue
            x = point["tokens_before"][0] if curve == "position" else point["context"]
            above = point["above_dense"] or {}
            found.append(
                {
                    "run": run["title"],
                    "curve": curve,
                    "x": x,
                    "tokens": point["tokens"],
                    "nats_per_token": point["nats_per_token"],
                    "above_dense": above.get("estimate"),
                    "low": above.get("low"),
                    "high": above.get("high"),
                }
            )
    return found
