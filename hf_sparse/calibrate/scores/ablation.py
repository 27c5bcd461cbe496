"""The exact effect of changing one unit, by running the model with it: a forward pass per unit and candidate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..gated import DENSE
from ..trial import Trial
from .base import Score, register_score


@register_score("ablation")
@dataclass(frozen=True)
class Ablation(Score):
    """The objective with one unit changed, against the objective of the choice."""

    def passes(self, shape: tuple[int, int, int]) -> float:
        layers, units, candidates = shape
        return layers * units * (candidates - 1) + 1

    def gains(self, trial: Trial, choice: np.ndarray) -> np.ndarray:
        before = trial.value(choice)
        gains = np.zeros(trial.shape)
        for place in np.ndindex(trial.shape):
            layer, unit, candidate = place
            if candidate != choice[layer, unit]:
                changed = choice.copy()
                changed[layer, unit] = candidate
                gains[place] = before - trial.value(changed)
        return gains


@register_score("ablation_from_dense")
@dataclass(frozen=True)
class AblationFromDense(Score):
    """What the dense model loses where one unit alone runs a candidate: often called the importance of a head.

    It misses heads that stand in for each other: taking away either one costs nothing.
    """

    sees_choice = False

    def passes(self, shape: tuple[int, int, int]) -> float:
        return Ablation().passes(shape)

    def gains(self, trial: Trial, choice: np.ndarray) -> np.ndarray:
        losses = -Ablation().gains(trial, np.full_like(choice, DENSE))
        return np.take_along_axis(losses, choice[..., None], -1) - losses
