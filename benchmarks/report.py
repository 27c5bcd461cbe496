"""Rows as text: one table per measure in Markdown, and one line per row while a run goes on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
OURS = "hf_sparse"
TIMES = "\u00d7"
TITLES = {
    "forward": "Forward",
    "backward": "Forward and backward",
    "decode": "One decode step: one query over a cache of so many keys",
    "memory": "Peak memory of one call",
    "prefill": "A whole model reading a prompt",
}


def line(row: Row) -> str:
    """Return one row as it is printed while the suite runs."""
    head = f"{row['pattern'][:30]:31}{row['method'][:34]:35}"
    if "error" in row:
        return f"{head}not measured: {row['error']}"
    if "multiple" in row:
        return f"{head}{row['extra_bytes'] / 2**20:>9.1f} MiB {row['multiple']:>6.2f} x (q + k + v + o){_goal(row)}"
    text = f"{head}{row['ms']:>10.3f} ms"
    if "tokens_per_second" in row:
        text += f" {row['tokens_per_second']:>9.0f} tokens/s"
    if "ratio" in row:
        text += f" {row['ratio']:>7.2f}x dense"
    if "ratio_to_best" in row and row["ratio_to_best"] != row["ratio"]:
        text += f" {row['ratio_to_best']:>7.2f}x best dense ({row['best_dense']})"
    if "pairs_limit" in row:
        tiles = f", tiles {row['tile_limit']:.1f}" if "tile_limit" in row else ""
        text += (
            f"   limits: pairs {row['pairs_limit']:.1f}{tiles}; {row.get('of_pairs_limit', 0):.0%} of pairs"
        )
    return text + _goal(row)


def _goal(row: Row) -> str:
    if "goal" not in row:
        return ""
    best = f" | {row['goal_to_best']:g}" if "goal_to_best" in row else ""
    return f"   goal {row['goal']:g}{best}"


def markdown(record: dict[str, Any]) -> str:
    """Return the whole record as a page."""
    machine, rows = record["machine"], record["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = machine.get("gpu") or machine["processor"]
    lines = [
        f"# Benchmark results: {where}",
        "",
        f"{machine['processor']}, {machine['threads']} threads; {versions}"
        + (f"; CUDA {machine['cuda']}, cuDNN {machine['cudnn']}" if "cuda" in machine else "")
        + f". Written {record['date']} by `{record['command']}`. What the columns mean: `benchmarks/README.md`.",
        "",
    ]
    if record["partial"]:
        lines += [
            "This run is not complete: it was interrupted, is still going on, or had no time for all.",
            "",
        ]
    for shape in _shapes(rows):
        here = [row for row in rows if _shape(row) == shape]
        for measure, title in TITLES.items():
            own = [row for row in here if row["measure"].split("_")[0] == measure]
            if own:
                maker = {"memory": _memory, "prefill": _prefill}.get(measure, _timed)
                lines += [f"## {title}: {_shape_text(own[0])}", "", *maker(own), ""]
    lines += _reasons(rows)
    if record["not_run"]:
        lines += ["## Not run", "", *(f"- {one['what']}: {one['reason']}" for one in record["not_run"]), ""]
    return "\n".join(lines)


def _shape(row: Row) -> tuple[Any, ...]:
    return row["heads"], row["kv_heads"], row["head_dim"], row["dtype"]


def _shape_text(row: Row) -> str:
    heads, kv_heads, head_dim, dtype = _shape(row)
    groups = "" if heads == kv_heads else f", {kv_heads} of keys and values,"
    model = f", {row['layers']} layers, {row['parameters'] / 1e6:.0f} M parameters" if "layers" in row else ""
    return f"{heads} heads{groups} of {head_dim}, {dtype}, batch 1{model}"


def _shapes(rows: list[Row]) -> list[tuple[Any, ...]]:
    return list(dict.fromkeys(_shape(row) for row in rows))


def _timed(rows: list[Row]) -> list[str]:
    table = [
        "| tokens | pattern | dense ms (backend) | ours ms \u00b1 quartiles | to dense | to best dense | pairs limit "
        "| tile limit | of pairs limit | goal | others, to dense |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in _ordered(row for row in rows if row["method"].startswith(OURS)):
        others = [
            f"{_method(other)} {other['ratio']:.2f}{TIMES}"
            for other in rows
            if _cell(other) == _cell(row) and not other["method"].startswith(OURS) and "ratio" in other
        ]
        name = row["pattern"] + row["method"].removeprefix(OURS) + (", CUDA graph" if row["graphed"] else "")
        if "error" in row:
            table.append(f"| {row['length']:,} | {name} | | not measured | | | | | | | {', '.join(others)} |")
            continue
        best = ""
        if "best_dense" in row:
            same = row["best_dense"] == row["dense_backend"]
            best = "the same" if same else f"{_times(row, 'ratio_to_best')} ({row['best_dense']})"
        table.append(
            f"| {row['length']:,} | {name} | {row.get('dense_ms', '')} ({row.get('dense_backend', '')}) "
            f"| {row['ms']} ± {row['iqr_ms']} | {_times(row, 'ratio')} | {best} | {_times(row, 'pairs_limit')} "
            f"| {_times(row, 'tile_limit')} | {_share(row)} | {_goal_cell(row)} | {', '.join(others)} |"
        )
    notes = dict.fromkeys(f"{row['method']}: {row['note']}" for row in rows if "note" in row and "ms" in row)
    return [*table, "", *_dense(rows), *(["", "Others: " + "; ".join(notes) + "."] if notes else [])]


def _dense(rows: list[Row]) -> list[str]:
    """Return the dense attentions that the ratios are taken against, by length."""
    found = []
    for row in _ordered(row for row in rows if row["pattern"] == "dense" and "ms" in row):
        sides = "" if row["causal"] else ", both sides"
        graphed = ", CUDA graph" if row["graphed"] else ""
        backend = f" ({row['backend']})" if "backend" in row else ""
        found.append(f"{row['length']:,}{sides}{graphed}: {row['method']}{backend} {row['ms']} ms")
    return ["Dense attention: " + "; ".join(found) + "."] if found else []


def _memory(rows: list[Row]) -> list[str]:
    table = [
        "Bytes above query, key and value (and the output's gradient), output and gradients included, as multiples of "
        "query + key + value + output.",
        "",
        "| tokens | pattern | forward | goal | forward + backward |",
        "|---:|---|---:|---:|---:|",
    ]
    cells: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in _ordered(rows):
        cells.setdefault((row["length"], row["pattern"], row["method"]), {})[row["measure"]] = row
    for (length, pattern, method), both in cells.items():
        backend = method.removeprefix(OURS) if method.startswith(OURS) else ""
        one, two = (
            f"{both[m]['multiple']:.2f}{TIMES}" if "multiple" in both.get(m, {}) else "not measured"
            for m in ("memory_forward", "memory_backward")
        )
        goal = (
            f"{both['memory_forward']['goal']:g}{TIMES}" if "goal" in both.get("memory_forward", {}) else ""
        )
        table.append(f"| {length:,} | {pattern}{backend} | {one} | {goal} | {two} |")
    return table


def _prefill(rows: list[Row]) -> list[str]:
    table = [
        "The limit is Amdahl's: attention's share of the dense pass, divided by the pairs limit of the pattern; the "
        "ceiling is a pass whose attention takes no time.",
        "",
        "| tokens | pattern | tokens/s | to dense | limit | ceiling | of the limit | workspace MiB |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in _ordered(rows):
        if "error" in row:
            table.append(f"| {row['length']:,} | {row['pattern']} | not measured | | | | | |")
            continue
        workspace = f"{row['workspace_bytes'] / 2**20:.0f}" if row["workspace_bytes"] is not None else ""
        table.append(
            f"| {row['length']:,} | {row['pattern']} | {row['tokens_per_second']:.0f} | {_times(row, 'ratio')} "
            f"| {_times(row, 'pairs_limit')} | {_times(row, 'ceiling')} | {_share(row)} | {workspace} |"
        )
    return table


def _reasons(rows: list[Row]) -> list[str]:
    """Return why methods have no number, each reason once with the cells it holds for."""
    found: dict[tuple[str, str], dict[tuple[str, str], list[str]]] = {}
    for row in _ordered(row for row in rows if "error" in row):
        cells = found.setdefault((row["method"], row["error"]), {})
        cells.setdefault((row["pattern"], row["measure"]), []).append(f"{row['length']:,}")
    if not found:
        return []
    listed = []
    for (method, error), cells in found.items():
        alike: dict[tuple[str, str], list[str]] = {}
        for (pattern, measure), lengths in cells.items():
            alike.setdefault((measure, ", ".join(lengths)), []).append(pattern)
        where = []
        for (measure, lengths), patterns in alike.items():
            which = ", ".join(patterns) if len(patterns) < 4 else f"{len(patterns)} patterns"
            where.append(f"{measure} at {lengths} tokens: {which}")
        listed.append(f"- {method}: {error} ({'; '.join(where)})")
    return ["## Not measured", "", *listed, ""]


def _ordered(rows: Iterable[Row]) -> list[Row]:
    """By length, dense first; within a length as they were measured."""
    return sorted(rows, key=lambda row: (row["length"], row["pattern"] != "dense"))


def _cell(row: Row) -> tuple[Any, ...]:
    return row["length"], row["pattern"], row["causal"], row["graphed"]


def _method(row: Row) -> str:
    return str(row["method"]).split(",")[0]


def _times(row: Row, name: str) -> str:
    value = row.get(name)
    return "" if value is None else f"{value:.1f}{TIMES}" if value >= 10 else f"{value:.2f}{TIMES}"


def _share(row: Row) -> str:
    return f"{row['of_pairs_limit']:.0%}" if "of_pairs_limit" in row else ""


def _goal_cell(row: Row) -> str:
    """Return the goal, in bold where the measured ratio reaches it."""
    cells = []
    for goal, ratio in (("goal", "ratio"), ("goal_to_best", "ratio_to_best")):
        if goal in row:
            reached = row.get(ratio, 0) >= row[goal]
            cells.append(f"**{row[goal]:g}**" if reached else f"{row[goal]:g}")
    return " / ".join(cells)
