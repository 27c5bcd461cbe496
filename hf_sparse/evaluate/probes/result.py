"""What a probe run gives: figures per variant and cell, each with a 95 % interval, made of the rows alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..bootstrap import Interval, difference
from ..serving import Served
from .cells import Cell

FIGURES = ("accuracy", "tokens_right", "nats_per_token")
_Z = 1.959963984540054  # of a two-sided 95 % interval


@dataclass(frozen=True, eq=False)
class ProbeRun:
    """One variant on all samples, [samples] each, cell by cell.

    answered: tokens of the answer; right: those that were the model's first guess; nats: summed over them.
    pairs, dense_pairs: counted over the sparse calls; see `Run` for the other figures.
    window: tokens that the pattern's window reaches back, the gaps of a dilated one included; None where it has none.
    """

    label: str
    pattern: dict[str, Any] | None
    adapter: str | None
    answered: np.ndarray
    right: np.ndarray
    nats: np.ndarray
    pairs: np.ndarray
    dense_pairs: np.ndarray
    calls: int
    layers: int
    ran: dict[str, int]
    window: int | None
    served: Served | None
    seconds: float
    tokens_per_second: float
    peak_memory: int | None
    memory_since: str

    @property
    def sparse(self) -> bool:
        return self.pattern is not None

    @property
    def title(self) -> str:
        return self.label if self.adapter is None else f"{self.label} + {self.adapter}"

    @property
    def density(self) -> float:
        """Pairs computed as a share of dense attention's."""
        if not self.sparse:
            return 1.0
        return float(self.pairs.sum() / self.dense_pairs.sum()) if self.dense_pairs.any() else float("nan")


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """All runs on the same samples; the first is dense.

    samples: of each cell; chances: what guessing is expected to reach in each cell's headline figure, None: unknown.
    """

    cells: tuple[Cell, ...]
    samples: int
    chances: tuple[float | None, ...]
    runs: tuple[ProbeRun, ...]
    config: dict[str, Any]
    machine: dict[str, Any]
    identity: dict[str, Any]
    rows: tuple[dict[str, Any], ...]

    @cached_property
    def probes(self) -> tuple[str, ...]:
        """The probes, with their options, in order."""
        return tuple(dict.fromkeys(str(cell.probe) for cell in self.cells))

    def cells_of(self, probe: str) -> list[int]:
        """Return which cells are of a probe."""
        return [i for i, cell in enumerate(self.cells) if str(cell.probe) == probe]

    def dense_of(self, run: ProbeRun) -> ProbeRun:
        """Return the dense run that `run` is held against: the one with its adapter on, or off, likewise."""
        return next(other for other in self.runs if not other.sparse and other.adapter == run.adapter)

    def figure(self, run: ProbeRun, cell: int, name: str) -> Interval:
        """Return one of FIGURES in one cell.

        Shares get Wilson's interval with a sample as one trial. For the share of tokens that is wide enough whatever
        the tokens of a sample have to do with each other: no share varies more than one that is 0 or 1. Nats per token
        get the bootstrap interval over samples.
        """
        values, weights = self._values(run, cell, name)
        if name == "nats_per_token":
            return difference(values, np.zeros_like(values), weights, "samples", self.config["seed"])
        return wilson(float(values.sum() / weights.sum()), len(values))

    def above_dense(self, run: ProbeRun, cell: int, name: str) -> Interval:
        """Return the figure above dense's on the same samples, with a paired interval.

        Of shares Newcombe's, of nats per token the bootstrap's, which has no width where all samples agree: that says
        nothing of shares, which do so whenever one run finds everything and the other nothing.
        """
        values, weights = self._values(run, cell, name)
        dense, _ = self._values(self.dense_of(run), cell, name)
        if name == "nats_per_token":
            return difference(values, dense, weights, "samples", self.config["seed"])
        return newcombe(values, dense, weights)

    def headlines(self, run: ProbeRun, probe: str) -> list[Interval]:
        """Return the headline figure of each cell of a probe."""
        return [self.figure(run, cell, self.cells[cell].probe.figure) for cell in self.cells_of(probe)]

    def density(self, run: ProbeRun, cell: int) -> float:
        """Return the pairs computed in one cell as a share of dense attention's; nan where not counted."""
        if not run.sparse:
            return 1.0
        own = slice(cell * self.samples, (cell + 1) * self.samples)
        pairs, dense_pairs = run.pairs[own].sum(), run.dense_pairs[own].sum()
        return float(pairs / dense_pairs) if dense_pairs else float("nan")

    def _values(self, run: ProbeRun, cell: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return per sample what is summed, and what the sum is divided by."""
        own = slice(cell * self.samples, (cell + 1) * self.samples)
        answered, right = run.answered[own].astype(float), run.right[own].astype(float)
        if name == "accuracy":
            return (right == answered).astype(float), np.ones_like(answered)
        return (right if name == "tokens_right" else run.nats[own]), answered


def wilson(share: float, trials: int) -> Interval:
    """Return a share of so many trials with Wilson's 95 % interval."""
    spread = _Z**2 / trials
    middle = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half), "samples", trials)


def newcombe(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> Interval:
    """Return the share of `a` above that of `b`, both sums [trials] of at most `weights`, with its 95 % interval.

    The ends of both Wilson intervals, put together with the correlation of the pairs less its continuity correction
    (method 10 of Newcombe 1998, "Improved confidence intervals for the difference between binomial proportions based on
    paired data", Statistics in Medicine 17).
    """
    trials, whole = len(weights), weights.sum()
    one, two = (wilson(float(part.sum() / whole), trials) for part in (a, b))
    x, y = ((part - share.estimate * weights) / weights for part, share in ((a, one), (b, two)))
    spread, together = math.sqrt(float(x @ x) * float(y @ y)), float(x @ y)
    correlation = (max(together - 0.5, 0.0) if together > 0 else together) / spread if spread > 1e-9 else 0.0
    down = (one.estimate - one.low, two.high - two.estimate)
    up = (one.high - one.estimate, two.estimate - two.low)
    below, above = (math.sqrt(max(0.0, p * p - 2 * correlation * p * q + q * q)) for p, q in (down, up))
    estimate = one.estimate - two.estimate
    return Interval(estimate, estimate - below, estimate + above, "samples", trials)
