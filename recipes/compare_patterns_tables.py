"""The tables of the report of `compare_patterns.py`: rows of cells, the first of which is the head."""

from collections.abc import Sequence
from typing import Any

from compare_patterns_rows import DENSE, TOLERANCES, Row, best_within, is_placed, unbeaten

UNMEASURED = "n/a"

HEAD = (
    "",
    "keys/query",
    "perplexity",
    "nats/token above dense [95 %]",
    "prompt: tokens/s",
    "x dense",
    "memory",
    "KV cache",
    "operator: limit",
    "forward",
    "forward + backward",
    "memory, forward",
    "memory, both",
)


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return the cells of one length, with a head."""
    front = unbeaten(list(rows))
    return [HEAD, *(_cells(row, rows[0], row["pattern"] in front) for row in rows)]


def choices(by_length: dict[int, list[Row]]) -> list[tuple[str, ...]]:
    """Return the cells of the answer: the fastest pattern for each length and each loss one is ready to bear."""
    head = ("", *(f"perplexity up to {tolerance:.0%} above dense" for tolerance in TOLERANCES))
    cells = [
        (length_title(rows), *(_choice(rows, tolerance) for tolerance in TOLERANCES))
        for rows in by_length.values()
    ]
    return [head, *cells]


def _choice(rows: list[Row], tolerance: float) -> str:
    if not any(is_placed(row) for row in rows):
        return UNMEASURED
    best = best_within(rows, tolerance)
    if best is None:
        return DENSE
    return f"{best['pattern']}: {best['prompt_times']:.2g}x, {best['nats_above_dense']:+.3f} nats/token"


def _cells(row: Row, dense: Row, is_unbeaten: bool) -> tuple[str, ...]:
    above = "" if row is dense else UNMEASURED
    if row["nats_above_dense"] is not None:
        above = f"{row['nats_above_dense']:+.3f}"
        if row["nats_above_dense_low"] is not None:
            above += f" [{row['nats_above_dense_low']:+.3f}, {row['nats_above_dense_high']:+.3f}]"
    return (
        row["pattern"] + (" *" if is_unbeaten else ""),
        _number(row["keys_per_query"], ",.0f"),
        _number(row["perplexity"], ",.3f" if (row["perplexity"] or 0) < 1000 else ",.0f"),
        above,
        _number(row["prompt_tokens_per_second"], ",.0f"),
        _times(row["prompt_times"], row is dense),
        _mebibytes(row["prompt_bytes"]),
        _mebibytes(row["kv_bytes"]),
        _times(row["pairs_limit"], row is dense),
        _milliseconds(row, "forward", row is dense),
        _milliseconds(row, "backward", row is dense),
        _mebibytes(row["forward_bytes"]),
        _mebibytes(row["backward_bytes"]),
    )


def _milliseconds(row: Row, part: str, is_dense: bool) -> str:
    if row[f"{part}_error"]:
        return "failed"
    if row[f"{part}_ms"] is None:
        return UNMEASURED
    times = "" if is_dense else f" ({_times(row[f'{part}_times'], is_dense)})"
    return (
        f"{row[f'{part}_ms']:,.3g} ms{times}"
        if row[f"{part}_ms"] < 1000
        else f"{row[f'{part}_ms']:,.0f} ms{times}"
    )


def _number(value: float | None, form: str) -> str:
    return UNMEASURED if value is None else format(value, form)


def _times(value: float | None, is_dense: bool) -> str:
    return "" if is_dense else UNMEASURED if value is None else f"{value:.3g}x"


def _mebibytes(value: int | None) -> str:
    return (
        UNMEASURED
        if value is None
        else f"{value / 2**20:,.3g} MiB"
        if value < 2**30
        else f"{value / 2**20:,.0f} MiB"
    )


def length_title(rows: Sequence[Row]) -> str:
    return f"{rows[0]['length']:,} tokens" + (" (extrapolation)" if rows[0]["extrapolation"] else "")


def patterns(by_length: dict[int, list[Row]]) -> list[tuple[str, ...]]:
    """Return what the names stand for."""
    first, *_ = by_length.values()
    keys = {n: {row["pattern"]: row["keys_per_query"] for row in rows} for n, rows in by_length.items()}
    rows = [("name", "pattern and options", *(f"keys/query at {n:,}" for n in by_length))]
    for row in first:
        if row["pattern"] != DENSE:
            counts = (_number(own[row["pattern"]], ",.0f") for own in keys.values())
            rows.append((row["pattern"], row["options"], *counts))
    return rows


def ran(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the operators that computed the quality of each pattern: counted, so that nothing dense passed for it."""
    labels = {title: label for label, title in record["settings"]["titles"].items()}
    rows = [("", "length", "layers", "attention calls", "backend/operator", "pairs computed, of dense")]
    for n, parts in sorted(record["lengths"].items(), key=lambda item: int(item[0])):
        for run in parts["quality"].get("runs", ()):
            if run["pattern"] is not None:
                counts = ", ".join(f"{name} {count:,}" for name, count in run["ran"].items())
                calls, density = f"{run['calls']:,}", f"{run['density']:.2%}"
                rows.append((labels[run["title"]], f"{int(n):,}", str(run["layers"]), calls, counts, density))
    return rows
