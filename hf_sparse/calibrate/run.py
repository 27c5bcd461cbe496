"""The one function of the package: `calibrate`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..backends import check_backend
from ..documents import Document
from ..evaluate.head import ChunkedHead
from ..evaluate.journal import Journal
from ..evaluate.machine import describe_machine
from ..evaluate.method import check_seed
from ..evaluate.processes import current_processes
from ..evaluate.variants import base_of, measured_in_eval_mode, weights_fingerprint
from ..hf.loading import load_tokenizer
from ..patterns import Pattern
from ..patterns.written import pattern_to_json
from .checkpointing import checkpointed
from .costs import COUNTED, MEASURES, Costs, density_costs, kv_byte_costs
from .frontier import find_frontier
from .gated import Gated
from .ledger import ROWS_FILE, Ledger
from .objective import Objective, check_objective
from .request import (
    BEYOND,
    STAGES,
    Search,
    candidates_of,
    check_budget,
    check_candidates_save,
    check_share,
    default_candidates,
)
from .result import Calibration
from .scores import Score
from .timing import check_timed, reads, time_costs
from .trial import Trial
from .units import Units, units_of
from .windows import Windows, windows_of

SAMPLES = 16
PROBE_TOKENS = 16


def calibrate(
    model: nn.Module,
    texts: Iterable[Document | str],
    candidates: Sequence[str | Pattern] | None = None,
    budget: float = 0.25,
    unit: str = "head",
    *,
    tokenizer: Any = None,
    of: str = "density",
    tokens: int | None = None,
    length: int | None = None,
    samples: int = SAMPLES,
    score: str | Score = "gate_gradient",
    rescore: bool | str | None = None,
    objective: str = "loss",
    stages: int = STAGES,
    beyond: int = BEYOND,
    backend: str = "auto",
    head_chunk: int = 1024,
    checkpointing: bool = False,
    seed: int = 0,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = False,
    announce: Callable[[str], None] | None = None,
) -> Calibration:
    """Find which units of a model need which pattern, by measuring on texts, so that the whole stays within a budget.

    Every unit starts on its cheapest candidate. The score says what each unit would gain from each costlier one; those
    that gain most for their cost are changed until a quarter of the way to the budget is spent, then the score is taken
    anew, as units act together. Every choice on the way is measured: that is the frontier. The model is as it was
    afterwards. Under ``accelerate launch`` the processes share the windows, and each gives the whole result.

    Args:
        model: a causal language model, an encoder with a masked-token head, or a PeftModel of either.
        texts: documents, or strings; windows are cut from them, each of one document. They should be like those the
            model will be used on, and not those it will be measured on.
        candidates: what a unit may run besides dense attention, patterns or their names; default 4 sinks and a window,
            together 32, 128 and 512 tokens, as far as these are at most half of `length`.
        budget: share of what the dense model costs that the choice may cost.
        unit: "head", "kv_head" (with the query heads that share it) or "layer".
        tokenizer: None loads the one saved with the model.
        of: what the budget counts: "density" (pairs), "kv_bytes" held by a cache, "prefill" or "decode" time.
        tokens: for how many the cost is counted; default `length`.
        length: tokens of a window; default 2,048, or what the model was trained for where that is less.
        samples: windows.
        score: what says which unit gains, a name or a `Score` with options; see `hf_sparse.calibrate.scores`.
        rescore: take the score anew at every stage (the default where it depends on what the other units run), "unit"
            for after every single change, False for once.
        objective: "loss" in nats per token, or "kl" to the dense model's predictions.
        stages, beyond: budgets up to the one asked for, and above it, at which choices are made and measured.
        head_chunk: positions whose logits are held at a time.
        checkpointing: compute every layer again in the backward pass, which holds one layer's activations at a time.
        seed: of what is masked for encoders.
        output: folder whose figures.jsonl gets every figure as it is computed; called again, with whatever budget, an
            interrupted calibration goes on from there.
        overwrite: start anew where `output` holds something else.
        progress: show a bar on stderr when that is a terminal.
        announce: is told in one sentence, before any window is read, how many forward passes there will be at most.
    Raises:
        ValueError: an unknown name, candidates that contradict the model, a budget that cannot be met, texts too short
            for the windows, a model without a language-model head, or an output folder of something else.
    """
    check_seed(seed)
    check_backend(backend)
    check_share(budget)
    check_objective(objective)
    if of not in MEASURES:
        raise ValueError(f"of must be one of {', '.join(MEASURES)}, got {of!r}")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be a whole number >= 1, got {samples!r}")
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
        raise ValueError(
            f"tokens must be a whole number >= 1 (for which the cost is counted), got {tokens!r}"
        )
    search = Search.of(score, rescore, stages, beyond)
    head, base = ChunkedHead(model, head_chunk), base_of(model)
    units = units_of(base, unit)
    if tokenizer is None:
        tokenizer = load_tokenizer(source_of(base))
    windows = windows_of(head, tokenizer, texts, length=length, samples=samples, seed=seed)
    tokens = windows.length if tokens is None else tokens
    given = default_candidates(windows.length) if candidates is None else candidates
    chosen_from = candidates_of(base, given, windows.length)
    processes, device = current_processes(), base.get_input_embeddings().weight.device
    costs = density = density_costs(base, units, chosen_from, tokens)
    if windows.length != tokens:  # what leaves nothing out of a window cannot be judged on it
        check_candidates_save(chosen_from, density_costs(base, units, chosen_from, windows.length))
    check_candidates_save(chosen_from, density)
    if of == "kv_bytes":
        costs = kv_byte_costs(base, units, chosen_from, tokens)
        check_candidates_save(chosen_from, costs)
    if of in COUNTED:
        check_budget(budget, costs, chosen_from)
    else:
        check_timed(base, of, tokens)
    with measured_in_eval_mode(model), checkpointed(base) if checkpointing else nullcontext():
        model.requires_grad_(False)
        judged = Objective(head, windows.entries, objective, device)
        config = _config(head, windows, judged, units, chosen_from, backend, seed)
        machine = describe_machine(device)
        identity = {**config, "weights": weights_fingerprint(model), "versions": machine["versions"]}
        identity["text"] = windows.fingerprint
        identity["adapter"] = model.active_adapter if base is not model else None
        identity["candidates"] = [pattern_to_json(one) for one in chosen_from]  # their names cut long lists
        with torch.no_grad():
            head.check(windows.entries[0].ids[0, :PROBE_TOKENS].tolist(), device)
        journal = Journal(output, ROWS_FILE, identity, processes, overwrite)
        most = search.passes((*units.shape, len(chosen_from)), judged.needs_dense)
        if announce is not None and processes.is_main:
            said = _announcement(units, windows, chosen_from, most)
            if of not in COUNTED:
                said += f", after {reads(units, len(chosen_from))} readings of {tokens} tokens that are timed"
            announce(said)
        with _bar(most * samples, progress and processes.is_main) as bar:
            gated = Gated(model, units, chosen_from, backend)
            ledger = Ledger(journal, processes, samples, bar)
            if of not in COUNTED:
                costs = ledger.once(
                    f"{of} of {tokens} tokens",
                    lambda: time_costs(
                        model, units, chosen_from, tokens, measure=of, backend=backend, progress=progress
                    ).as_json(),
                    Costs.from_json,
                )
                check_budget(budget, costs, chosen_from)
            trial = Trial(gated, judged, ledger, costs)
            found = find_frontier(trial, density, search, budget)
            ledger.finish()
    return Calibration(
        pattern=units.pattern(found.chosen.choice, chosen_from),
        units=units,
        candidates=chosen_from,
        costs=costs,
        budget=float(budget),
        chosen=found.chosen,
        frontier=found.points,
        uniform=found.uniform,
        gains=found.gains,
        choosing=found.choosing,
        passes=ledger.passes + judged.needs_dense,
        config={
            **config,
            "score": str(search.score),
            "rescore": search.rescore,
            "documents": windows.documents,
        },
        machine=machine,
    )


def _config(
    head: ChunkedHead,
    windows: Windows,
    judged: Objective,
    units: Units,
    candidates: Sequence[Pattern],
    backend: str,
    seed: int,
) -> dict[str, Any]:
    """Return as plain JSON values what every figure depends on besides weights, texts and versions."""
    base = base_of(head.model)
    return {
        "model": getattr(base.config, "_name_or_path", ""),
        "architecture": type(base).__name__,
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": judged.device.type,
        "unit": units.kind,
        "candidates": [str(candidate) for candidate in candidates],
        "objective": judged.kind,
        "length": windows.length,
        "samples": len(windows.entries),
        "backend": backend,
        "seed": seed,
    }


def _announcement(units: Units, windows: Windows, candidates: Sequence[Pattern], passes: int) -> str:
    layers, count = units.shape
    names = ", ".join(map(str, candidates))
    return (
        f"{layers} layers x {count} units ({units.kind}), candidates {names}: at most {passes} forward passes (a "
        f"backward pass counts as 2) over each of {len(windows.entries)} windows of {windows.length} tokens, "
        f"of {windows.documents} texts"
    )


def source_of(base: Any) -> str:
    """Return where the model was loaded from; raise ValueError where it does not say."""
    source = getattr(base.config, "_name_or_path", "")
    if not source:
        raise ValueError(
            f"this {type(base).__name__} was not loaded from anywhere, so its tokenizer is unknown; pass tokenizer=..."
        )
    return str(source)


def _bar(total: int, progress: bool) -> tqdm:
    return tqdm(
        total=total,
        desc="calibrate",
        unit="pass",
        disable=None if progress else True,
        bar_format="{desc}: {percentage:3.0f}% |{bar}| {n:.0f}/{total:.0f} passes "
        "[{elapsed}, at most {remaining} left]",
    )
