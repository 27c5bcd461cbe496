"""The figures of a probe run as plain JSON values: the content of probe.json, which all else is made of."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..csv_files import as_csv
from ..figures import clean
from .result import FIGURES, ProbeResult, ProbeRun

FORMAT = 1  # of probe.json
Figures = dict[str, Any]


def as_json(result: ProbeResult) -> Figures:
    """Return every figure; what could not be measured is null.

    All that may differ between two runs of the same probes is under "timing".
    """
    return clean(
        {
            "format": FORMAT,
            "machine": result.machine,
            "config": result.config,
            "probes": [_probe(result, name) for name in result.probes],
            "runs": [_run(result, run) for run in result.runs],
            "timing": {run.title: _timing(run) for run in result.runs},
        }
    )


def probe_csv(figures: Figures) -> str:
    """Return the content of probe.csv: a row per run, cell and figure, numbers with all digits."""
    return as_csv(
        [
            {
                "run": run["title"],
                "held_against": run["held_against"],
                **{key: cell[key] for key in ("probe", "length", "axis", "place", "samples", "density")},
                "figure": name,
                **_ends("", cell[name]),
                **_ends("above_dense_", (cell["above_dense"] or {}).get(name)),
                "chance": cell["chance"] if name == cell["headline"] else None,
            }
            for run in figures["runs"]
            for cell in run["cells"]
            for name in FIGURES
        ]
    )


def _ends(prefix: str, interval: dict[str, Any] | None) -> dict[str, Any]:
    found = interval or {}
    return {f"{prefix}{name}": found.get(name) for name in ("estimate", "low", "high")}


def _probe(result: ProbeResult, name: str) -> dict[str, Any]:
    own = [result.cells[i] for i in result.cells_of(name)]
    probe = own[0].probe
    return {
        "probe": name,
        "kind": probe.name,
        "options": dataclasses.asdict(probe),
        "axis": probe.axis,
        "headline": probe.figure,
        "chance": result.chances[result.cells_of(name)[0]],
        "lengths": list(dict.fromkeys(cell.length for cell in own)),
        "places": list(dict.fromkeys(cell.place for cell in own)),
    }


def _run(result: ProbeResult, run: ProbeRun) -> dict[str, Any]:
    dense = result.dense_of(run)
    served = run.served
    return {
        "title": run.title,
        "label": run.label,
        "pattern": run.pattern,
        "adapter": run.adapter,
        "held_against": None if run is dense else dense.title,
        "window": run.window,
        "density": run.density,
        "calls": run.calls,
        "layers": run.layers,
        "ran": run.ran,
        "kv_cache": None if served is None else {"tokens": served.tokens, "bytes": served.kv_bytes},
        "cells": [_cell(result, run, index, run is not dense) for index in range(len(result.cells))],
    }


def _cell(result: ProbeResult, run: ProbeRun, index: int, above: bool) -> dict[str, Any]:
    cell = result.cells[index]
    return {
        "probe": str(cell.probe),
        "headline": cell.probe.figure,
        "length": cell.length,
        "axis": cell.probe.axis,
        "place": cell.place,
        "samples": result.samples,
        "chance": result.chances[index],
        "density": result.density(run, index),
        **{name: dataclasses.asdict(result.figure(run, index, name)) for name in FIGURES},
        "above_dense": (
            {name: dataclasses.asdict(result.above_dense(run, index, name)) for name in FIGURES}
            if above
            else None
        ),
    }


def _timing(run: ProbeRun) -> dict[str, Any]:
    served = run.served
    return {
        "seconds": run.seconds,
        "tokens_per_second": run.tokens_per_second,
        "prefill_tokens": None if served is None else served.tokens,
        "prefill_seconds": None if served is None else served.seconds,
        "peak_memory_bytes": run.peak_memory,
        "peak_memory_since": run.memory_since,
    }
