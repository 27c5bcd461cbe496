"""What a prompt costs as `generate` begins with it: the time until its cache is filled, and the bytes that holds."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from .head import ChunkedHead
from .scoring import empty_cache, fed_at_once

REPEATS = 3
ENOUGH_SECONDS = 2.0  # of repeating


@dataclass(frozen=True)
class Served:
    """One prompt read with a cache.

    tokens: of the prompt; seconds: the median; kv_bytes: of all keys and values held after it, room included; None for
    models that hold none.
    """

    tokens: int
    seconds: float
    kv_bytes: int | None


@torch.inference_mode()
def serve(head: ChunkedHead, ids: np.ndarray, device: torch.device, *, chunk: int | None = None) -> Served:
    """Read the prompt ids [N] up to three times and return the median time; models without a cache only read it.

    Args:
        chunk: tokens fed at a time; None as `scoring.fed_at_once` says.
    """
    prompt = torch.from_numpy(ids.astype(np.int64))[None].to(device)
    seconds: list[float] = []
    kv_bytes = None
    while len(seconds) < REPEATS and sum(seconds) < ENOUGH_SECONDS:
        cache = empty_cache(head.model) if head.cached else None
        start = time.perf_counter()
        _read(head, prompt, cache, fed_at_once(head.model, len(ids), chunk))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        kv_bytes = held_bytes(cache) if cache is not None else None
    return Served(len(ids), statistics.median(seconds), kv_bytes)


def held_bytes(cache: Cache) -> int:
    """Return the bytes of all keys and values in a cache of any kind."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    kept = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(x.numel() * x.element_size() for x in kept if x is not None)


def _read(head: ChunkedHead, prompt: Tensor, cache: Cache | None, step: int) -> None:
    """Run the body over the whole prompt and the output head on the last position of each part."""
    if cache is None:
        head.states(prompt)
        return
    for part in prompt.split(step, dim=1):
        head.states(part, past_key_values=cache, use_cache=True)
