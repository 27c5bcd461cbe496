"""One dense pass over each window, in which some queries are asked how much of their weight every pattern keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..backends import Call
from ..backends.mass import Sample, kept_masses, sample_queries
from ..backends.selected import Selected, select_all, selected_of
from ..calibrate.gated import Gated, LayerCall
from ..calibrate.windows import Windows
from ..evaluate.head import ChunkedHead
from ..evaluate.processes import Processes
from ..hf.computed import AttentionCall
from ..patterns import Pattern
from ..selectors import divided


def kept_by_window(
    gated: Gated,
    head: ChunkedHead,
    windows: Windows,
    patterns: Sequence[Pattern],
    *,
    queries: int,
    seed: int,
    device: torch.device,
    processes: Processes,
    bar: tqdm,
) -> np.ndarray:
    """Return the mean over a window's sampled queries of the mass each pattern keeps, float64 [windows, P, L, H].

    Args:
        gated: runs the dense model.
        queries: drawn from every window, the same in all layers.
    Raises:
        ValueError: attention weights that are not finite.
    """
    found: list[tuple[int, np.ndarray]] = []
    for number in processes.share(range(len(windows.entries))):
        rows: dict[int, Tensor] = {}

        def watch(seen: LayerCall, number: int = number, rows: dict[int, Tensor] = rows) -> None:
            rows[seen.layer] = kept_by_head(seen.asked, patterns, queries, (seed, number)).cpu()

        with torch.no_grad(), gated.watching(watch):
            head.states(windows.entries[number].ids.to(device))
        found.append((number, torch.stack([rows[layer] for layer in sorted(rows)], 1).numpy()))
        bar.update()
    return np.stack([own for _, own in sorted(processes.gather(found), key=lambda one: one[0])])


def kept_by_head(
    asked: AttentionCall, patterns: Sequence[Pattern], queries: int, seed: tuple[int, ...]
) -> Tensor:
    """Return the mean over sampled queries and rows of the mass that each pattern keeps in one call, float64 [P, H].

    Raises:
        ValueError: attention weights that are not finite.
    """
    samples = sample_queries(
        asked.query, asked.key, asked.call, asked.segments, queries, np.random.default_rng(seed), asked.sinks
    )
    _check_finite(samples, asked.call.layer)
    heads = asked.query.shape[1]
    kept = []
    for pattern in patterns:
        call, selected = _read_by(pattern, asked)
        masses = kept_masses(samples, call, heads, selected)
        kept.append(torch.cat([one.double().transpose(1, 2).flatten(0, 1) for one in masses]).mean(0))
    return torch.stack(kept)


def _read_by(pattern: Pattern, asked: AttentionCall) -> tuple[Call, list[Selected | None] | None]:
    """Return the call with the part of the pattern that positions decide, and what is selected besides."""
    division = divided(pattern, asked.call.layer)
    call = replace(asked.call, pattern=division.static)
    if division.selector is None:
        return call, None
    query, key = asked.query, asked.key
    selections = select_all(division.selector, query, key, asked.segments, call.constraint)
    return call, selected_of(division, call, asked.segments, selections, query.shape[1], query.shape[2])


def _check_finite(samples: Sequence[Sample | None], layer: int) -> None:
    for sample in samples:
        if sample is not None and not bool(sample.weights.isfinite().all()):
            raise ValueError(
                f"layer {layer} gives attention weights that are not finite; check the weights of the model, or use "
                f"another dtype"
            )
