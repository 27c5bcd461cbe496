"""What one attention call asks for besides its tensors, and what it reports of itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..patterns.base import Pattern
from ..plan.constraint import Constraint


@dataclass(frozen=True)
class Call:
    """The fixed part of an attention call: everything but the tensors and the segments.

    scale: multiplies the scores; None is D ** -0.5.
    softcap: scores become softcap * tanh(score / softcap) before masking.
    dropout: share of the attention weights dropped, in training.
    layer: index of the layer, for patterns that look at it.
    """

    pattern: Pattern
    constraint: Constraint = Constraint()
    scale: float | None = None
    softcap: float | None = None
    dropout: float = 0.0
    layer: int = 0


@dataclass(frozen=True)
class Inputs:
    """What a backend must know of the tensors of a call to say whether it can run it.

    head_size: the larger of D and Dv.
    gradients: a backward pass may follow.
    """

    device: torch.device
    dtype: torch.dtype
    head_size: int
    gradients: bool = False


@dataclass
class CallRecord:
    """What really ran: filled by `attend`, read by tests, the patch probe, and the evaluation.

    backend, operator: names, e.g. "torch" and "flash+tiled", or "flex" and "flex_attention"; "dense" is the operator of
        the reference, and of `auto` where nothing is sparse about a call.
    pieces: disjoint pieces that ran, over all segments.
    pairs, dense_pairs: (query, key) pairs the plan computed per head, and those of dense attention under the model's
        own constraint, summed over batch rows.
    """

    layer: int
    backend: str
    operator: str = ""
    pieces: int = 0
    pairs: int = 0
    dense_pairs: int = 0


@dataclass
class Recorder:
    """The calls seen while `recording()` was open."""

    calls: list[CallRecord] = field(default_factory=list)

    @property
    def density(self) -> float:
        """Pairs computed as a share of the pairs of dense attention; nan when nothing ran."""
        dense = sum(call.dense_pairs for call in self.calls)
        return sum(call.pairs for call in self.calls) / dense if dense else float("nan")


_active = threading.local()


@contextmanager
def recording() -> Iterator[Recorder]:
    """Collect a `CallRecord` for every attention call this thread makes inside the block."""
    recorder = Recorder()
    stack = _active.__dict__.setdefault("stack", [])
    stack.append(recorder)
    try:
        yield recorder
    finally:
        stack.remove(recorder)


def record(call: CallRecord) -> None:
    """Hand a finished call to every open recorder."""
    for recorder in getattr(_active, "stack", ()):
        recorder.calls.append(call)
