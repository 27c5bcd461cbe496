"""Probes of a language model, dense and sparse on the same samples: one teacher-forced forward pass each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ...documents import Document
from ...hf import SparseSettings
from ...patterns import Pattern, Union
from ...patterns.placed import Placed
from ..counting import Counted
from ..head import ChunkedHead
from ..journal import Journal, Row
from ..machine import PeakMemory, describe_machine
from ..method import check_seed
from ..preparation import check_cache, check_length, trained_length
from ..processes import current_processes
from ..serving import Served
from ..tokens import check_vocabulary
from ..variants import (
    Variant,
    base_of,
    check_sparse,
    check_variants,
    chosen_variants,
    entered,
    measured_in_eval_mode,
    weights_fingerprint,
)
from .base import Probe
from .cells import lay_out, make_samples, samples_fingerprint
from .material import Material
from .registry import probe_class
from .result import ProbeResult, ProbeRun
from .work import AnswerScorer, Work, order

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ROWS_FILE = "probe_samples"
HEAD_TOKENS = 16  # that the head is checked on
HEAD_CHUNK = 1024  # positions whose logits are held at a time


def probe(
    model: nn.Module,
    tokenizer: Any,
    probes: Sequence[str | Probe],
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    distances: Sequence[int] | None = None,
    samples: int = 20,
    haystack: Iterable[Document | str] | None = None,
    patterns: Sequence[str | os.PathLike[str] | Pattern | SparseSettings] = (),
    backend: str = "auto",
    seed: int = 0,
    without_adapter: bool = False,
    control: str | None = None,
    batch_size: int = 1,
    prefill_chunk: int | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> ProbeResult:
    """Ask for what lies at known places of long texts, with dense attention and with each pattern, on the same samples.

    A sample has exactly `length` tokens, BOS first where the tokenizer has one, and is one forward pass: the answer is
    fed, and each of its tokens is right where it is the model's first guess (teacher forcing). Only the answer goes
    through the output head. The model is as it was afterwards. Under ``accelerate launch`` the processes share the
    samples, and each gives the whole result.

    Args:
        model: a causal language model, or a PeftModel of one.
        probes: names (passkey, needle, needle_multikey, variables, copy) with default options, or probes.
        lengths: tokens of a sample, BOS, question and answer included.
        depths: where in the haystack the fact lies, 0 (begin) to 1 (right before the question).
        distances: tokens from a copied token back to its original; by default the powers of two that fit every length.
        samples: of each probe at each length and place; sample i asks the same at all of them.
        haystack: texts that hide the facts, joined; by default a few sentences are repeated.
        patterns, backend, without_adapter, control, overwrite, progress: as in `perplexity`.
        seed: of the samples, of patterns that draw, and of the intervals.
        batch_size: samples in one forward pass; prefill_chunk: tokens fed at a time, the earlier ones in a cache.
        output: folder whose probe_samples.jsonl gets every row as it is made; called again with the same arguments, an
            interrupted run goes on behind the last complete row.
    Raises:
        ValueError: a model without a causal language-model head, an unknown probe or pattern, a length too short for a
            probe's own words, a place that is not in the text, more positions or tokens than the model has, too few
            tokens in the tokenizer, an output folder of another run, or a sparse run in which no call was sparse.
    """
    for name, value in (("samples", samples), ("batch_size", batch_size), ("prefill_chunk", prefill_chunk)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}.")
    if prefill_chunk is not None and batch_size > 1:
        raise ValueError(
            f"prefill_chunk={prefill_chunk} reads one sample at a time, got batch_size={batch_size}; use batch_size=1."
        )
    check_seed(seed)
    variants = chosen_variants(model, patterns, backend, without_adapter, control)
    head = ChunkedHead(model, HEAD_CHUNK)
    if head.masked:
        raise ValueError(
            f"{head.name} predicts masked tokens, and probes ask what follows; use a causal language model."
        )
    base = base_of(model)
    asked = [probe_class(one)() if isinstance(one, str) else one for one in probes]
    longest = max(lengths, default=1)
    material = Material.of(tokenizer, haystack, longest)
    cells = lay_out(asked, lengths, depths, distances, material)
    check_length(base, longest, "length")
    check_cache(head, prefill_chunk)
    made = make_samples(cells, samples, material, seed)
    check_vocabulary(max(int(sample.ids.max()) for sample in made), base)
    device = base.get_input_embeddings().weight.device
    config = {
        "probes": [str(one) for one in asked],
        "lengths": list(lengths),
        "depths": list(depths),
        "distances": None if distances is None else list(distances),
        "samples": samples,
        "haystack": "repeated sentences" if haystack is None else "documents",
        "prefix": "bos" if material.prefix else "none",
        "batch_size": batch_size,
        "prefill_chunk": prefill_chunk,
        "model": getattr(base.config, "_name_or_path", ""),
        "architecture": type(base).__name__,
        "dtype": str(base.dtype).removeprefix("torch."),
        "trained_length": trained_length(base),
        "backend": backend,
        "seed": seed,
    }
    machine = describe_machine(device)
    identity = {
        **config,
        "text": samples_fingerprint(made),
        "weights": weights_fingerprint(model),
        "runs": [[variant.title, variant.pattern] for variant in variants],
        "versions": machine["versions"],
        "device": device.type,
    }
    processes = current_processes()
    scorer = AnswerScorer(head, device, batch_size=batch_size, prefill_chunk=prefill_chunk)
    served: list[Served | None] = []
    with measured_in_eval_mode(model), torch.inference_mode():
        head.check(made[0].ids[:HEAD_TOKENS].tolist(), device)
        scorer.check_chunks(
            max((one.ids for one in made), key=len), longest, any(variant.sparse for variant in variants)
        )
        check_variants(model, variants, control)
        journal = Journal(output, ROWS_FILE, identity, processes, overwrite)
        work = Work(scorer, cells, made, samples, device, journal, processes, progress)
        with work.bar(len(variants)) as bar:
            for variant in variants:
                bar.set_description(variant.title)
                torch.manual_seed(seed)
                with entered(model, variant, control):
                    work.run(variant, bar)
                    served.append(work.serve() if processes.is_main else None)
    rows = journal.finish(order)
    served = processes.gather([served])[0]  # what the main process measured
    runs = []
    for variant, prompt in zip(variants, served, strict=True):
        own = [row for row in rows if row["run"] == variant.title]
        check_sparse(variant, Counted.of_rows(own), head.name)
        runs.append(_run_of(variant, own, prompt, PeakMemory(device).since))
    chances = tuple(cell.probe.chance(material) for cell in cells)
    return ProbeResult(tuple(cells), samples, chances, tuple(runs), config, machine, identity, tuple(rows))


def _run_of(variant: Variant, rows: Sequence[Row], served: Served | None, memory_since: str) -> ProbeRun:
    """Return the run that the rows of a variant, one per sample in order, are of."""
    counted = Counted.of_rows(rows)
    seconds = sum(row["timing"]["seconds"] for row in rows)
    peaks = [row["timing"]["peak_memory_bytes"] for row in rows]
    columns = {
        name: np.array([row[name] for row in rows])
        for name in ("answered", "right", "nats", "pairs", "dense_pairs")
    }
    return ProbeRun(
        label=variant.label,
        pattern=variant.pattern,
        adapter=variant.adapter,
        **columns,
        calls=counted.calls,
        layers=len(counted.layers),
        ran=counted.ran,
        window=None if variant.sparse is None else _window(variant.sparse.pattern),
        served=served,
        seconds=seconds,
        tokens_per_second=sum(row["length"] for row in rows) / seconds if seconds else float("nan"),
        peak_memory=None if None in peaks else max(peaks),
        memory_since=memory_since,
    )


def _window(pattern: Pattern) -> int | None:
    """Return how many tokens the widest window of a pattern and its members reaches back; None where there is none."""
    if isinstance(pattern, (Union, Placed)):  # the window of a Placed one is no limit of what is seen
        return max(filter(None, map(_window, pattern.members)), default=None)
    window, dilation = getattr(pattern, "window", None), getattr(pattern, "dilation", 1)
    if not isinstance(window, int):  # none, or one for each layer
        return None
    return window * (max(dilation) if isinstance(dilation, tuple) else dilation)
