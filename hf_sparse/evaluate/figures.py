"""Every figure of an evaluation as plain JSON values: the content of results.json, which everything else is made of."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from .bootstrap import LEAST_DOCUMENTS, GapClosed, Interval
from .results import Result, Run

FORMAT = 2  # of results.json


def as_json(result: Result) -> dict[str, Any]:
    """Return every figure of the evaluation as plain JSON values; what could not be measured is null.

    All that may differ between two runs of the same evaluation is under "timing".
    """
    documents = result.text.documents
    return clean(
        {
            "format": FORMAT,
            "machine": result.machine,
            "config": result.config,
            "text": {
                "documents": len(documents),
                "tokens": result.text.tokens,
                "bytes": int(result.bytes.sum()),
                "words": int(result.words.sum()),
                "truncated_tokens": result.text.truncated,
                "skipped_documents": [dataclasses.asdict(skipped) for skipped in result.text.skipped],
                "fingerprint": result.text.fingerprint,
            },
            "runs": [_run_as_json(result, run) for run in result.runs],
            "gap_closed": [
                {"pattern": label, **_gap_as_json(gap), "control": control_name(result)}
                for label, gap in adapter_gaps(result)
            ],
            "timing": {run.title: _timing(run) for run in result.runs},
        }
    )


def adapter_gaps(result: Result) -> list[tuple[str, GapClosed]]:
    """Return the gap closed of each pattern measured with and without the adapter.

    The dense side is the control where there is one, else the dense run with this same adapter: an adapter trained on
    the sparse model is not what dense training would have given, so that a control gives another figure.
    """
    dense, control = result.find(False), result.find(False, "control") or result.find(False, "adapter")
    if not dense or not control:
        return []
    plain = {run.label: run for run in result.find(True)}
    return [
        (run.label, result.gap_closed(run, control[0], plain[run.label], dense[0]))
        for run in result.find(True, "adapter")
        if run.label in plain
    ]


def control_name(result: Result) -> str:
    """Return what `adapter_gaps` holds the adapter against."""
    return "the dense control" if result.find(False, "control") else "the same adapter run dense"


def clean(value: Any) -> Any:
    """Return `value` with null for the numbers JSON does not have."""
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _run_as_json(result: Result, run: Run) -> dict[str, Any]:
    dense = result.dense_of(run)
    above = run is not dense
    served = run.served
    return {
        "title": run.title,
        "label": run.label,
        "pattern": run.pattern,
        "adapter": run.adapter,
        "held_against": dense.title if above else None,
        "nats_per_token": result.nats_per_token(run),
        "perplexity": result.perplexity(run),
        "word_perplexity": result.word_perplexity(run),
        "byte_perplexity": result.byte_perplexity(run),
        "bits_per_byte": result.bits_per_byte(run),
        "macro_perplexity": result.macro_perplexity(run),
        "key_perplexity": result.key_perplexity(run),
        "key_tokens": None if result.key_counts is None else int(result.key_counts.sum()),
        "nats_above_dense": dataclasses.asdict(result.difference(run, dense)) if above else None,
        "bits_per_byte_above_dense": (
            dataclasses.asdict(result.bits_per_byte_difference(run, dense)) if above else None
        ),
        "loss_by_position": _by_position(result, run, dense),
        "loss_by_context": _by_context(result, run, dense),
        "density": run.density,
        "calls": run.calls,
        "layers": run.layers,
        "ran": run.ran,
        "kv_cache": None if served is None else {"tokens": served.tokens, "bytes": served.kv_bytes},
    }


def _by_position(result: Result, run: Run, dense: Run) -> list[dict[str, Any]]:
    tokens, losses = result.position_tokens.sum(axis=0), result.loss_by_position(run)
    above = [None] * len(tokens) if run is dense else result.position_difference(run, dense)
    return [
        {
            "tokens_before": [2**bucket, 2 ** (bucket + 1) - 1],
            "tokens": int(n),
            "nats_per_token": float(loss),
            "above_dense": _curve_interval(interval),
        }
        for bucket, (n, loss, interval) in enumerate(zip(tokens, losses, above, strict=True))
    ]


def _by_context(result: Result, run: Run, dense: Run) -> list[dict[str, Any]]:
    if not result.contexts:
        return []
    tokens = int(result.on_curve.sum()) * result.config["context_targets"]
    above = [None] * len(result.contexts) if run is dense else result.context_difference(run, dense)
    return [
        {
            "context": context,
            "tokens": tokens,
            "nats_per_token": float(loss),
            "above_dense": _curve_interval(interval),
        }
        for context, loss, interval in zip(result.contexts, result.loss_by_context(run), above, strict=True)
    ]


def _curve_interval(interval: Interval | None) -> dict[str, Any] | None:
    """Return an interval over documents; without ends where fewer than LEAST_DOCUMENTS reach the point."""
    if interval is None:
        return None
    found = dataclasses.asdict(interval)
    return found if interval.units >= LEAST_DOCUMENTS else {**found, "low": None, "high": None}


def _timing(run: Run) -> dict[str, Any]:
    served = run.served
    return {
        "seconds": run.seconds,
        "tokens_per_second": run.tokens_per_second,
        "prefill_tokens": None if served is None else served.tokens,
        "prefill_seconds": None if served is None else served.seconds,
        "peak_memory_bytes": run.peak_memory,
        "peak_memory_since": run.memory_since,
    }


def _gap_as_json(gap: GapClosed) -> dict[str, Any]:
    closed: Interval | None = gap.closed
    return {
        "gap": dataclasses.asdict(gap.gap),
        "closed": dataclasses.asdict(closed) if closed else "no gap to close",
        "residual": dataclasses.asdict(gap.residual),
    }
