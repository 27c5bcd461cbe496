"""The figures of a comparison as flat rows, one per length and pattern, and the patterns to take."""

import math
from typing import Any

DENSE, MEMORY = "dense", "memory"
# Perplexity over dense attention's that a reader may be ready to pay.
TOLERANCES = (0.01, 0.05, 0.2)
BROKEN = 1.0  # nats/token above dense from which a pattern is of no use without training

Row = dict[str, Any]


def rows_of(record: dict[str, Any], length: int) -> list[Row]:
    """Return dense attention and then the patterns, those nearest to dense first; what was not measured is None.

    place: in the list of patterns. keys_per_query: the mean over the queries of a text of that length, as counted.
    Ratios ("times") are how many times as fast as dense, in the same run. Bytes of the operator are beyond its inputs;
    those of the prompt beyond the loaded model, cache included.
    """
    parts = record["lengths"][str(length)]
    runs = {run["title"]: run for run in parts["quality"].get("runs", ())}
    titles = {DENSE: DENSE, **record["settings"]["titles"]}
    trained = record["settings"]["trained_length"]
    rows = []
    for place, (label, title) in enumerate(titles.items()):
        run = runs.get(title, {})
        row: Row = {"length": length, "place": place, "pattern": label, "options": title}
        row["extrapolation"] = bool(trained and length > trained)
        row |= _quality(run, length)
        row |= _prompt(parts["prompt"], label)
        row["kv_bytes"] = (run.get("kv_cache") or {}).get("bytes")
        for part in ("forward", "backward"):
            row |= _operator(parts[part] or [], part, label)
        row |= _limits(parts["forward"] or [], label)
        memory = parts[MEMORY].get(label, {})
        row |= {f"{part}_bytes": memory.get(part) for part in ("forward", "backward")}
        rows.append(row)
    return sorted(rows, key=_order)


def best_within(rows: list[Row], tolerance: float) -> Row | None:
    """Return the fastest pattern that costs at most that share of perplexity; None where dense is faster."""
    fit = [
        row for row in rows if is_placed(row) and math.expm1(min(row["nats_above_dense"], 700)) <= tolerance
    ]
    best = max(fit, key=lambda row: row["prompt_times"], default=None)
    return best if best and best["prompt_times"] > 1 else None


def unbeaten(rows: list[Row]) -> set[str]:
    """Return the patterns of use that are faster than dense and than every pattern that loses less.

    Args:
        rows: those that lose less first.
    """
    found, fastest = set(), 1.0
    for row in rows:
        if is_placed(row) and row["nats_above_dense"] <= BROKEN and row["prompt_times"] > fastest:
            found.add(row["pattern"])
            fastest = row["prompt_times"]
    return found


def is_placed(row: Row) -> bool:
    """True for a pattern whose loss and speed against dense attention are both known."""
    return row["pattern"] != DENSE and None not in (row["prompt_times"], row["nats_above_dense"])


def _quality(run: dict[str, Any], length: int) -> Row:
    above = run.get("nats_above_dense") or {}
    density = run.get("density")
    return {
        "density": density,
        "keys_per_query": None if density is None else density * length / 2,
        "perplexity": run.get("perplexity"),
        "nats_per_token": run.get("nats_per_token"),
        "nats_above_dense": above.get("estimate"),
        "nats_above_dense_low": above.get("low"),
        "nats_above_dense_high": above.get("high"),
        "interval_unit": above.get("unit"),
    }


def _prompt(part: dict[str, Any], label: str) -> Row:
    own, dense = part.get(label, {}), part.get(DENSE, {})
    return {
        "prompt_tokens_per_second": own.get("tokens_per_second"),
        "prompt_times": dense["seconds"] / own["seconds"] if own else None,
        "prompt_bytes": own.get("workspace"),
    }


def _operator(cells: list[Row], part: str, label: str) -> Row:
    cell = _cell(cells, label)
    return {
        f"{part}_ms": cell.get("ms"),
        f"{part}_times": cell.get("ratio"),
        f"{part}_error": cell.get("error"),
    }


def _limits(cells: list[Row], label: str) -> Row:
    cell = _cell(cells, label)
    return {"pairs_limit": cell.get("pairs_limit"), "operator": cell.get("operator")}


def _cell(cells: list[Row], label: str) -> Row:
    return next((cell for cell in cells if cell["pattern"] == label), {})


def _order(row: Row) -> tuple[bool, float]:
    above = row["nats_above_dense"]
    return row["pattern"] != DENSE, math.inf if above is None else above
