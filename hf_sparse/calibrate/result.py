"""What a calibration found: a pattern, the frontier it lies on, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..patterns import Pattern
from ..patterns.written import pattern_to_json
from .costs import Costs
from .units import Units

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Point:
    """One choice, measured on the calibration text.

    label: how it came about.
    choice: int [L, U], the number of each unit's candidate.
    cost: share of the dense model's; density: pairs as a share of the dense model's, which is the cost where that is
        what the budget counts.
    values: float64 [windows], the objective of each window in nats per token.
    """

    label: str
    choice: np.ndarray
    cost: float
    density: float
    values: np.ndarray

    @property
    def value(self) -> float:
        """The mean objective."""
        return float(self.values.mean())


@dataclass(frozen=True, eq=False)
class Calibration:
    """The result of `calibrate`.

    pattern: what was chosen, for `patch_model`.
    candidates: what a unit may run, dense first.
    chosen: the point of the pattern; frontier: all choices on the way from the cheapest to dense, ascending in cost.
    uniform: every candidate in all units, dense first.
    gains: float [L, U, C], what the score first said that changing one unit gains over the cheapest choice.
    passes: forward passes per window in all, a backward pass counting as 2; choosing: those of them that
        the choice took, without measuring it.
    """

    pattern: Pattern
    units: Units
    candidates: tuple[Pattern, ...]
    costs: Costs
    budget: float
    chosen: Point
    frontier: tuple[Point, ...]
    uniform: tuple[Point, ...]
    gains: np.ndarray
    passes: float
    choosing: float
    config: dict[str, Any]
    machine: dict[str, Any]

    @property
    def dense(self) -> Point:
        return self.uniform[0]

    @property
    def cheapest(self) -> Point:
        return self.frontier[0]

    def closed(self, point: Point) -> float | None:
        """Return the share of what the cheapest choice loses that a point regains; None where that loses nothing."""
        gap = self.cheapest.value - self.dense.value
        return (self.cheapest.value - point.value) / gap if gap > 0 else None

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "format": FORMAT,
            "pattern": pattern_to_json(self.pattern),
            "candidates": [pattern_to_json(candidate) for candidate in self.candidates],
            "unit": self.units.kind,
            "layers": list(self.units.layers),
            "heads": self.units.heads,
            "kv_heads": self.units.kv_heads,
            "budget": self.budget,
            "cost": {
                "of": self.costs.measure,
                "tokens": self.costs.tokens,
                "dense": self.costs.dense,
                "mixed_layer": self.costs.mixed,
            },
            "chosen": self._point(self.chosen),
            "frontier": [self._point(point) for point in self.frontier],
            "uniform": [self._point(point) for point in self.uniform],
            "gains": self.gains.tolist(),
            "passes": self.passes,
            "choosing": self.choosing,
            "config": self.config,
            "machine": self.machine,
        }

    def _point(self, point: Point) -> Mapping[str, Any]:
        return {
            "label": point.label,
            "cost": point.cost,
            "density": point.density,
            "value": point.value,
            "closed": self.closed(point),
            "choice": point.choice.tolist(),
            "values": point.values.tolist(),
        }
