"""Speed and memory of reading a prompt (prefill), dense and with each pattern under equal conditions."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..hf import patched, unpatch_model
from ..hf.extension import readable_tokens
from ..patterns import Pattern
from .machine import PeakMemory


@dataclass(frozen=True)
class Prefill:
    """One prompt length, dense (pattern None) or with a pattern.

    seconds: the fastest of the repeats. workspace: the most bytes held above what the loaded model and this process
    held before the call, key-value cache included; None where the system does not tell (no resettable mark).
    """

    pattern: str | None
    length: int
    seconds: float
    workspace: int | None

    @property
    def tokens_per_second(self) -> float:
        return self.length / self.seconds


def measure_prefill(
    model: Any,
    patterns: Sequence[Pattern | None],
    lengths: Sequence[int],
    *,
    repeats: int = 3,
    backend: str = "auto",
    progress: bool = False,
) -> list[Prefill]:
    """Time one forward pass over a prompt, cache filled and the last position's logits kept, as `generate` starts.

    A batch of one row of random tokens. Each configuration warms up once at its length; then the configurations take
    turns, so that a slow moment of the machine hits all of them, and the fastest turn counts. The model is left
    unpatched and in eval mode.

    Args:
        patterns: None stands for the unpatched, dense model.
        lengths: prompt lengths in tokens.
    Raises:
        ValueError: a length below 1 or beyond the model's positions, or repeats < 1.
    """
    limit = readable_tokens(model)
    for length in lengths:
        if length < 1 or (limit and length > limit):
            raise ValueError(
                f"a prompt of {length} tokens does not fit the model's {limit} positions; choose 1 to {limit}."
            )
    if repeats < 1:
        raise ValueError(f"repeats must be >= 1, got {repeats}.")
    unpatch_model(model).eval()
    generator = torch.Generator().manual_seed(0)
    found: list[Prefill] = []
    with tqdm(total=len(lengths) * len(patterns) * (repeats + 1), disable=None if progress else True) as bar:
        for length in lengths:
            ids = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(model.device)
            seconds = [float("inf")] * len(patterns)
            workspace: list[int | None] = [None] * len(patterns)
            for turn in range(repeats + 1):
                for i, pattern in enumerate(patterns):
                    bar.set_description(f"prefill {length}: {pattern or 'dense'}")
                    with patched(model, pattern, backend=backend) if pattern else nullcontext():
                        if turn == 0:
                            _forward(model, ids)  # plans are built, kernels chosen
                            workspace[i] = _workspace(model, ids)
                        else:
                            seconds[i] = min(seconds[i], _forward(model, ids))
                    bar.update()
            found += [
                Prefill(str(pattern) if pattern else None, length, seconds[i], workspace[i])
                for i, pattern in enumerate(patterns)
            ]
    return found


@torch.inference_mode()
def _forward(model: nn.Module, ids: torch.Tensor) -> float:
    """Return the seconds of one prefill of ids [1, N]."""
    start = time.perf_counter()
    model(input_ids=ids, use_cache=True, logits_to_keep=1)
    if ids.device.type == "cuda":
        torch.cuda.synchronize(ids.device)
    return time.perf_counter() - start


def _workspace(model: nn.Module, ids: torch.Tensor) -> int | None:
    """Return the bytes one prefill holds at its peak above what is held now."""
    gc.collect()
    if ids.device.type == "cpu":
        _give_back_freed_memory()
    memory = PeakMemory(ids.device)
    if ids.device.type == "cuda":
        before: int = torch.cuda.memory_allocated(ids.device)
    elif memory.since == "run":
        before = _resident()
    else:
        return None
    _forward(model, ids)
    peak = memory.bytes()
    return None if peak is None else max(peak - before, 0)


def _give_back_freed_memory() -> None:
    """Let glibc return freed memory to the system; otherwise a pass could reuse it and seem to need none."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent in other C libraries
        if trim is not None:
            trim(0)


def _resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * _page_size()


def _page_size() -> int:
    import resource

    return resource.getpagesize()
