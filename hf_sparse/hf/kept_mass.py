"""The share of the dense attention mass that a running model keeps, measured on some queries of every call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from ..backends.mass import kept_masses, sample_queries
from ..backends.selected import selected_of
from ..patterns.checks import LARGEST_SEED, check_count
from ..selectors import divided
from .active import settings, unwrap
from .computed import AttentionCall, compute_of, computed_by
from .stored_settings import SparseSettings

_REPORTS = "_hf_sparse_reports"  # what describe says besides of a model that is being measured


@dataclass(frozen=True)
class LayerMass:
    """What a layer keeps of the dense attention mass.

    heads: for each query head the mean over the queries.
    queries: how many were measured.
    """

    heads: tuple[float, ...]
    queries: int

    @property
    def mean(self) -> float:
        return sum(self.heads) / len(self.heads)


class KeptMass:
    """What the layers of a model keep of the dense attention mass; see `monitored`."""

    def __init__(self, queries: int, seed: int) -> None:
        if isinstance(queries, bool) or not isinstance(queries, int) or queries < 1:
            raise ValueError(
                f"queries must be a whole number per sequence and call from 1 on, got {queries!r}; 16 is usual"
            )
        check_count("seed", seed, 0, LARGEST_SEED)
        self._queries, self._generator = queries, np.random.default_rng(seed)
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}

    @property
    def layers(self) -> dict[int, LayerMass]:
        """What was measured in each layer so far, by its index."""
        return {
            layer: LayerMass(tuple((self._sums[layer] / count).tolist()), count)
            for layer, count in sorted(self._counts.items())
        }

    @property
    def mean(self) -> float:
        """The mean over the layers; nan before anything is measured."""
        found = [layer.mean for layer in self.layers.values()]
        return sum(found) / len(found) if found else float("nan")

    def reset(self) -> None:
        """Forget what was measured."""
        self._sums, self._counts = {}, {}

    def see(self, asked: AttentionCall) -> None:
        """Measure one call."""
        for mass in kept_of_call(asked, self._queries, self._generator):
            self.add(asked.call.layer, mass)

    def add(self, layer: int, mass: Tensor) -> None:
        """Take in what queries of a layer keep, [R, H, S]."""
        mass = mass.transpose(1, 2).flatten(0, 1)
        self._sums[layer] = self._sums[layer] + mass.sum(0) if layer in self._sums else mass.sum(0)
        self._counts[layer] = self._counts.get(layer, 0) + len(mass)

    def queries(self, layer: int) -> int:
        """Return how many queries of a layer were measured; what they keep is not asked of the device."""
        return self._counts.get(layer, 0)

    def take(self, layer: int) -> LayerMass:
        """Return what was measured in a layer, and forget it."""
        count = self._counts.pop(layer)
        return LayerMass(tuple((self._sums.pop(layer) / count).tolist()), count)

    def report(self) -> list[str]:
        """Return what `describe` says."""
        found = self.layers
        if not found:
            return ["mass      of the dense attention: nothing is measured yet"]
        return [
            f"mass      {self.mean:.3f} of the dense attention is kept, the mean of {len(found)} layers",
            *(
                f"          layer {layer}: {one.mean:.3f} of {one.queries:,} queries"
                for layer, one in found.items()
            ),
        ]

    def __repr__(self) -> str:
        return "\n".join(self.report())


@contextmanager
def monitored(model: nn.Module, queries: int = 16, seed: int = 0) -> Iterator[KeptMass]:
    """Measure, inside the block, what the sparse layers of `model` keep of the dense attention mass.

    In every attention call of a forward pass, in training and in generation, some queries are drawn and given their
    dense weights under the model's own limits; kept is what falls on keys that the call reads, by position or by
    content. Layers in which a pattern leaves nothing out keep 1. Queries are left out whose keys a cache has dropped,
    as bounded caches of static patterns do. Outputs, gradients and other random numbers are as without.

    Args:
        queries: at most so many of each sequence in a call; each costs the scores of one dense query per head.
        seed: of the draws.
    Yields:
        What is measured, by layer: ``mass.layers[3].mean``, ``.heads``, ``.queries``. `describe` reports it.
    Raises:
        ValueError: the model is not patched, `queries` is less than 1, or `seed` less than 0.
    """
    kept = KeptMass(queries, seed)
    with watched_by(model, kept.see, "monitored"), reporting(model, kept.report):
        yield kept


def running(base: nn.Module, name: str) -> SparseSettings:
    """Return what a model runs.

    name: of what is to be done with it, for messages.
    Raises:
        ValueError: it is not patched.
    """
    current = settings(base)
    if current is None:
        raise ValueError(
            f"{type(base).__name__} runs dense attention, which keeps everything; call hf_sparse.patch_model before "
            f"hf_sparse.{name}"
        )
    return current


@contextmanager
def watched_by(model: nn.Module, see: Callable[[AttentionCall], None], name: str) -> Iterator[None]:
    """Show every sparse attention call of `model` inside the block to `see` before it is computed.

    Layers that gradient checkpointing runs again are not shown again.

    name: of what watches, for messages.
    Raises:
        ValueError: the model is not patched, or, at a call, runs another pattern than when the block began.
    """
    base = unwrap(model)
    current = running(base, name)
    before = {module: compute_of(module)[0] for module in base.modules()}
    left = False  # while a block that began later goes on

    def compute(asked: AttentionCall) -> Tensor:
        if settings(base) != current and not left:
            raise ValueError(
                f"the model was given another pattern inside hf_sparse.{name}; leave the block before and begin anew"
            )
        if torch._C._current_graph_task_id() == -1 and not left:  # the id of a backward pass
            see(asked)
        own = before.get(asked.module)
        return asked.attend() if own is None else own(asked)

    with computed_by(base, compute):
        try:
            yield
        finally:
            left = True


def kept_of_call(asked: AttentionCall, queries: int, generator: np.random.Generator) -> list[Tensor]:
    """Return what drawn queries of each sequence of a call keep, [R, H, S] of R rows."""
    call, heads, q_len = asked.call, *asked.query.shape[1:3]
    division = divided(call.pattern, call.layer)
    samples = sample_queries(asked.query, asked.key, call, asked.segments, queries, generator, asked.sinks)
    selected = None
    if asked.selections is not None:
        selected = selected_of(division, call, asked.segments, asked.selections, heads, q_len)
    return kept_masses(samples, replace(call, pattern=division.static), heads, selected)


@contextmanager
def reporting(model: nn.Module, report: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Let `describe` say what `report` gives inside the block."""
    base = unwrap(model)
    base.__dict__[_REPORTS] = (*base.__dict__.get(_REPORTS, ()), report)
    try:
        yield
    finally:
        if others := tuple(one for one in base.__dict__.pop(_REPORTS) if one is not report):
            base.__dict__[_REPORTS] = others


def reports(base: nn.Module) -> list[str]:
    """Return what is to be said of a model that is being measured."""
    return [line for report in base.__dict__.get(_REPORTS, ()) for line in report()]
