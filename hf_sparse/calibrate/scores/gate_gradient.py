"""The first-order effect on the loss of a gate per unit and candidate (as of heads in Michel et al. 2019, 1905.10650).

A unit runs ``sum_c gate[c] * attention under candidate c``. The gradient for its gates, taken where the model runs the
choice so far, says for all units and candidates at once what a little more of each would change: one forward and one
backward pass. Heads that are alike share the credit, and heads that need each other get it only with the other; taking
it again after some were chosen, as `calibrate` does, tells these apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..gated import DENSE
from ..trial import GRADIENT_PASSES, Trial
from .base import Score, gained, register_score


@register_score("gate_gradient")
@dataclass(frozen=True)
class GateGradient(Score):
    """Gradients at points between the choice and the dense model, averaged (integrated gradients, 1703.01365).

    points: where to take them, from 0 (the choice) to 1 (dense).
    """

    points: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        if not self.points or not all(0 <= point <= 1 for point in self.points):
            raise ValueError(f"points must be numbers from 0 (the choice) to 1 (dense), got {self.points!r}")

    def passes(self, shape: tuple[int, int, int]) -> float:
        return GRADIENT_PASSES * len(self.points)

    def gains(self, trial: Trial, choice: np.ndarray) -> np.ndarray:
        own, dense = trial.one_hot(choice), trial.one_hot(np.full_like(choice, DENSE))
        losses = [trial.gradient((1 - point) * own + point * dense) for point in self.points]
        return gained(np.mean(losses, 0), choice)
