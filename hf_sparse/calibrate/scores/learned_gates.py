"""Gates that are learned with a penalty on what they cost (DuoAttention, Xiao et al. 2024, 2410.10819)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..gated import DENSE
from ..trial import GRADIENT_PASSES, Trial
from .base import Score, gained, register_score


@register_score("learned_gates")
@dataclass(frozen=True)
class LearnedGates(Score):
    """A gate per unit between its cheapest candidate (0) and dense (1), all begun at 1; the score is where it ends.

    The penalty is the L1 norm of the gates; optimised by Adam on the mean over all windows. A candidate between the two
    counts as open by its share of what dense costs more.

    steps, rate: of Adam; penalty: nats per fully open gate.
    """

    steps: int = 20
    rate: float = 0.1
    penalty: float = 0.02
    sees_choice = False

    def passes(self, shape: tuple[int, int, int]) -> float:
        return GRADIENT_PASSES * self.steps

    def gains(self, trial: Trial, choice: np.ndarray) -> np.ndarray:
        cheap, dense = trial.one_hot(trial.costs.cheapest), trial.one_hot(np.full_like(choice, DENSE))
        gate = np.ones(trial.units.shape)
        first, second = np.zeros_like(gate), np.zeros_like(gate)
        for step in range(1, self.steps + 1):
            per_gate = trial.gradient(cheap + gate[..., None] * (dense - cheap))
            slope = (per_gate * (dense - cheap)).sum(-1) + self.penalty
            first = 0.9 * first + 0.1 * slope
            second = 0.99 * second + 0.01 * slope**2
            gate -= self.rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.99**step)) + 1e-8)
            gate = gate.clip(0, 1)
        return gained(gate[..., None] * (1 - trial.costs.openness), choice)
