"""Costs in seconds, measured on the model itself: reading a prompt, and decoding behind one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..evaluate.preparation import check_length
from ..evaluate.scoring import empty_cache
from ..evaluate.variants import base_of
from ..hf import patched
from ..hf.routing import is_causal
from ..patterns import Pattern
from .costs import Costs, density_costs
from .gated import DENSE
from .units import Units

REPEATS = 5  # turns; each configuration has one in each, so that a slow moment of the machine hits all
STEPS = 16  # tokens decoded in a turn


def check_timed(base: Any, measure: str, tokens: int) -> None:
    """Raise ValueError for more tokens than the model has positions, or decoding asked of an encoder."""
    if measure == "prefill":
        check_length(base, tokens, "tokens")
        return
    if not is_causal(base):
        raise ValueError(
            f"a budget of decode time is for models that decode, and {type(base).__name__} is an encoder; "
            "use of='prefill'"
        )
    steps = (REPEATS + 1) * STEPS
    check_length(base, tokens + steps, f"tokens + {steps} decoded")


def reads(units: Units, candidates: int) -> int:
    """Return how many times `time_costs` has the model read all tokens, at most."""
    return (2 * candidates - 1 if units.count > 1 else candidates) * (REPEATS + 1)


def time_costs(
    model: Any,
    units: Units,
    candidates: Sequence[Pattern],
    tokens: int,
    *,
    measure: str,
    backend: str,
    progress: bool = False,
) -> Costs:
    """Return the seconds of a prefill of `tokens` tokens, or of one decoded token behind them.

    Measured are the model with every unit on one candidate, for each of them, and with half of the units of every layer
    on it and the others dense. Between these, time is taken to grow with the pairs that a unit computes, and a layer
    whose units differ to cost the extra of the halves. What the model does besides attention is part of every choice.
    """
    choices = timed_choices(units, len(candidates))
    seconds = measure_seconds(
        model, [units.pattern(choice, candidates) for choice in choices], tokens, measure, backend, progress
    )
    pairs = density_costs(base_of(model), units, candidates, tokens).shares
    return costs_of(measure, tokens, pairs, choices, seconds)


def timed_choices(units: Units, candidates: int) -> list[np.ndarray]:
    """Return the choices [L, U] that are timed: every candidate alone, then each but dense with half of it dense."""
    choices = [np.full(units.shape, number) for number in range(candidates)]
    for number in range(candidates):
        if number != DENSE and units.count > 1:
            split = np.full(units.shape, number)
            for layer in range(
                len(split)
            ):  # other halves in each, as in a choice: layers that differ share no plans
                split[layer, (np.arange(units.count // 2) + layer) % units.count] = DENSE
            choices.append(split)
    return choices


def costs_of(
    measure: str, tokens: int, pairs: np.ndarray, choices: Sequence[np.ndarray], seconds: Sequence[float]
) -> Costs:
    """Return the costs of which the timed choices took these seconds.

    pairs: float [L, U, C], shares of the dense model's pairs, by which saved time is divided among units.
    """
    candidates = pairs.shape[2]
    shares = np.full(pairs.shape, 1 / pairs[..., DENSE].size)
    for number in range(candidates):
        saved = pairs[..., DENSE] - pairs[..., number]
        if saved.sum() > 0:
            shares[..., number] -= (1 - seconds[number] / seconds[DENSE]) * saved / saved.sum()
    extra: list[float] = []
    for split, value in zip(choices[candidates:], seconds[candidates:], strict=True):
        predicted = np.take_along_axis(shares, split[..., None], -1).sum()
        extra.append((value / seconds[DENSE] - predicted) / pairs.shape[0])
    mixed = max(0.0, float(np.mean(extra))) if extra else 0.0
    return Costs(measure, tokens, shares, float(seconds[DENSE]), mixed=mixed)


def measure_seconds(
    model: Any, patterns: Sequence[Pattern], tokens: int, measure: str, backend: str, progress: bool = False
) -> list[float]:
    """Return the median seconds of a prefill of `tokens` random tokens, or of a token decoded behind them."""
    base = base_of(model)
    device = base.get_input_embeddings().weight.device
    is_decoder = is_causal(base)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.config.get_text_config().vocab_size, (1, tokens), generator=generator).to(device)
    found: list[list[float]] = [[] for _ in patterns]
    caches: list[Any] = [None] * len(patterns)
    bar = tqdm(
        total=len(patterns) * (REPEATS + 1), desc=f"timing {measure}", disable=None if progress else True
    )
    with torch.inference_mode(), bar:
        for turn in range(REPEATS + 1):
            for number, pattern in enumerate(patterns):
                with patched(base, pattern, backend=backend):
                    if measure == "prefill" or caches[number] is None:
                        caches[number] = cache = empty_cache(base) if is_decoder else None
                        took = _seconds(base, ids, cache)
                        if measure == "prefill":
                            caches[number] = None
                    if measure == "decode":
                        steps = [_seconds(base, ids[:, :1], caches[number]) for _ in range(STEPS)]
                        took = statistics.median(steps)
                if turn:  # in the first, plans are made and kernels chosen
                    found[number].append(took)
                bar.update()
    return [statistics.median(times) for times in found]


def _seconds(base: Any, ids: Tensor, cache: Any) -> float:
    decoding = {} if cache is None else {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    start = time.perf_counter()
    base(input_ids=ids, **decoding)
    if ids.device.type == "cuda":
        torch.cuda.synchronize(ids.device)
    return time.perf_counter() - start
