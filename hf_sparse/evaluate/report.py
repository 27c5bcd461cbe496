"""Results on disk, and as a table a person reads."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .bootstrap import GapClosed, Interval
from .results import Result, Run


def save_results(result: Result, folder: str | os.PathLike[str]) -> list[Path]:
    """Write results.json (every figure) and per_document.jsonl (every sum) into `folder`; return their paths.

    Each file appears whole or not at all; one of the same name is replaced.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "per_document.jsonl": "".join(json.dumps(row) + "\n" for row in per_document(result)),
        "results.json": json.dumps(as_json(result), indent=2) + "\n",  # last: where it is, all is
    }
    for name, content in files.items():
        write_atomically(folder / name, content.encode())
    return [folder / name for name in reversed(files)]


def write_atomically(path: Path, content: bytes) -> None:
    """Let `path` hold `content`, or leave it as it was."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)  # mkstemp gives 0600; give what open() would
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def as_json(result: Result) -> dict[str, Any]:
    """Return every figure of the evaluation as plain JSON values; what could not be measured is null."""
    documents = result.text.documents
    position_tokens = result.position_tokens.sum(axis=0)
    return _clean(
        {
            "machine": result.machine,
            "config": result.config,
            "text": {
                "documents": len(documents),
                "tokens": result.text.tokens,
                "bytes": sum(document.text_bytes for document in documents),
                "truncated_tokens": result.text.truncated,
                "skipped_documents": list(result.text.skipped),
                "fingerprint": result.text.fingerprint,
            },
            "runs": [_run_as_json(result, run, position_tokens) for run in result.runs],
            "gap_closed": [
                {"pattern": label, **_gap_as_json(gap), "control": _control(result)}
                for label, gap in adapter_gaps(result)
            ],
        }
    )


def _run_as_json(result: Result, run: Run, position_tokens: np.ndarray) -> dict[str, Any]:
    dense = _dense_of(result, run)
    return {
        "label": run.label,
        "pattern": run.pattern,
        "adapter": run.adapter,
        "nats_per_token": result.nats_per_token(run),
        "perplexity": result.perplexity(run),
        "bits_per_byte": result.bits_per_byte(run),
        "macro_perplexity": result.macro_perplexity(run),
        "nats_above_dense": dataclasses.asdict(result.difference(run, dense)) if run is not dense else None,
        "loss_by_position": [
            {"tokens_before": [2**b, 2 ** (b + 1) - 1], "tokens": int(n), "nats_per_token": float(loss)}
            for b, (n, loss) in enumerate(zip(position_tokens, result.loss_by_position(run), strict=True))
        ],
        "density": run.density,
        "calls": run.calls,
        "layers": run.layers,
        "ran": run.ran,
        "seconds": run.seconds,
        "tokens_per_second": run.tokens_per_second,
        "peak_memory_bytes": run.peak_memory,
        "peak_memory_since": run.memory_since,
    }


def per_document(result: Result) -> list[dict[str, Any]]:
    """Return one row per scored document with the sums that every figure is made of."""
    rows = []
    for i, document in enumerate(result.text.documents):
        runs = [
            {
                "label": run.label,
                "adapter": run.adapter,
                "nats": float(run.nats[i]),
                "block_nats": run.block_nats[i].tolist(),
                "position_nats": run.position_nats[i].tolist(),
            }
            for run in result.runs
        ]
        rows.append(
            {
                "name": document.name,
                "tokens": document.tokens,
                "bytes": document.text_bytes,
                "truncated_tokens": document.truncated,
                "position_tokens": result.position_tokens[i].tolist(),
                "runs": runs,
            }
        )
    return rows


def adapter_gaps(result: Result) -> list[tuple[str, GapClosed]]:
    """Return the gap closed of each pattern measured with and without the adapter.

    The dense side is the control where there is one, else the dense run with this same adapter: an adapter trained on
    the sparse model is not what dense training would have given, so that a control gives another figure.
    """
    dense, control = result.find(False), result.find(False, "control") or result.find(False, "adapter")
    if not dense or not control:
        return []
    pairs = zip(result.find(True), result.find(True, "adapter"), strict=True)
    return [
        (with_it.label, result.gap_closed(with_it, control[0], plain, dense[0])) for plain, with_it in pairs
    ]


def _control(result: Result) -> str:
    return "the dense control" if result.find(False, "control") else "the same adapter run dense"


def table(result: Result) -> str:
    """Return what was measured as lines of text, about 120 characters wide."""
    text = result.text
    head = f"{len(text.documents)} documents, {text.tokens:,} tokens scored"
    notes = (
        [f"{text.truncated:,} cut off at {result.config['max_length']:,} tokens"] if text.truncated else []
    )
    if text.skipped:
        notes.append(f"{len(text.skipped)} documents too short to score")
    if text.prefix == "none":
        notes.append("no BOS token: scored from token 2")
    rows: list[tuple[str, ...]] = [
        ("", "nats/token", "above dense [95 %]", "ppl", "bits/byte", "density", "tokens/s", "peak")
    ]
    rows += [_row(result, run) for run in result.runs]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [", ".join([head, *notes]), ""]
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("  ".join(cells).rstrip())
    lines += ["", *_footnotes(result)]
    return "\n".join(lines).rstrip()


def _row(result: Result, run: Run) -> tuple[str, ...]:
    dense = _dense_of(result, run)
    return (
        run.title,
        f"{result.nats_per_token(run):.4f}",
        "" if run is dense else str(result.difference(run, dense)).split(" (")[0],
        f"{result.perplexity(run):.3f}",
        f"{result.bits_per_byte(run):.4f}",
        "?" if math.isnan(run.density) else f"{run.density:.1%}",
        f"{run.tokens_per_second:,.0f}",
        "?" if run.peak_memory is None else f"{run.peak_memory / 2**20:,.0f} MiB",
    )


def _footnotes(result: Result) -> list[str]:
    lines = [
        f"{run.title}: {run.layers} layers, "
        + ", ".join(f"{count} calls {name}" for name, count in run.ran.items())
        for run in result.runs
        if run.sparse
    ]
    lines += [
        f"gap closed by the adapter, {label}: {gap}; above {_control(result)}: {gap.residual} nats/token"
        for label, gap in adapter_gaps(result)
    ]
    if len(result.runs) > 1:
        interval = result.difference(result.runs[-1], result.runs[0])
        lines.append(f"intervals: paired bootstrap over {interval.units} {interval.unit}")
    return lines


def _dense_of(result: Result, run: Run) -> Run:
    """Return the dense run that `run` is held against: the one with its adapter on, or off, likewise."""
    return result.find(False, run.adapter)[0]


def _gap_as_json(gap: GapClosed) -> dict[str, Any]:
    closed: Interval | None = gap.closed
    return {
        "gap": dataclasses.asdict(gap.gap),
        "closed": dataclasses.asdict(closed) if closed else "no gap to close",
        "residual": dataclasses.asdict(gap.residual),
    }


def _clean(value: Any) -> Any:
    """Return `value` with null for the numbers JSON does not have."""
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
