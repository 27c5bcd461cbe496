"""What one attention call asks for besides its tensors, and what it reports of itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..patterns.base import Pattern
from ..plan.constraint import Constraint


@dataclass(frozen=True)
class Call:
    """The fixed part of an attention call: everything but the tensors and the segments.

    scale: multiplies the scores; None is D ** -0.5.
    softcap: scores become softcap * tanh(score / softcap) before masking.
    dropout: share of the attention weights dropped, in training.
    layer: index of the layer, for patterns that look at it.
    near: pairs of tokens at least so far apart are scored by a query and key of their own; None has no such pairs.
    """

    pattern: Pattern
    constraint: Constraint = Constraint()
    scale: float | None = None
    softcap: float | None = None
    dropout: float = 0.0
    layer: int = 0
    near: int | None = None


def check_far(query: Tensor, key: Tensor, call: Call, far: tuple[Tensor, Tensor] | None) -> None:
    """Raise ValueError unless a call that knows far pairs comes with the query and key that score them."""
    if call.constraint.beyond is not None:
        raise ValueError(
            f"a call says by near which pairs are far, got constraint.beyond={call.constraint.beyond}; leave it at None"
        )
    if call.near is None and far is None:
        return
    if call.near is None or far is None:
        given = "far without call.near" if call.near is None else f"call.near={call.near} without far"
        raise ValueError(f"far pairs need a distance and a query and key to score them, got {given}")
    if call.near < 1:
        raise ValueError(
            f"near must be at least 1, a token's distance from itself is never far, got {call.near}"
        )
    if not call.constraint.causal:
        raise ValueError(
            f"far pairs are those of causal attention, got {call.constraint}; leave near at None"
        )
    shapes = [tuple(x.shape) for x in far]
    if shapes != [tuple(query.shape), tuple(key.shape)]:
        raise ValueError(
            f"far must have the shapes of query {tuple(query.shape)} and key {tuple(key.shape)}, got {shapes[0]} and "
            f"{shapes[1]}"
        )


@dataclass(frozen=True)
class Inputs:
    """What a backend must know of the tensors of a call to say whether it can run it.

    head_size: the larger of D and Dv.
    gradients: a backward pass may follow.
    sinks: a sink joins the softmax of each head.
    selected: blocks are read that were selected by their content.
    """

    device: torch.device
    dtype: torch.dtype
    head_size: int
    gradients: bool = False
    sinks: bool = False
    selected: bool = False


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


@dataclass(eq=False)  # two open at once are two, also while they have seen the same calls
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


def is_recording() -> bool:
    """True where this thread has an open recorder."""
    return bool(getattr(_active, "stack", ()))


def record(call: CallRecord) -> None:
    """Hand a finished call to every open recorder."""
    for recorder in getattr(_active, "stack", ()):
        recorder.calls.append(call)
