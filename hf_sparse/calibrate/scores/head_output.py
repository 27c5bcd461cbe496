"""The error of a head's output under a candidate, as a share of the output."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..gated import DENSE, LayerCall
from ..trial import Trial
from .base import Score, gained, register_score, share_of


@register_score("head_output")
@dataclass(frozen=True)
class HeadOutput(Score):
    """One dense pass in which every candidate is computed too: ``|candidate - dense|^2 / |dense|^2`` of each unit."""

    sees_choice = False

    def passes(self, shape: tuple[int, int, int]) -> float:
        return 2.0

    def gains(self, trial: Trial, choice: np.ndarray) -> np.ndarray:
        candidates, size = trial.gated.candidates, trial.units.size

        def measure(seen: LayerCall) -> Tensor:
            dense = seen.attend(candidates[DENSE])
            apart = torch.stack([_energy(seen.attend(one) - dense, size) for one in candidates], -1)
            return share_of(apart, _energy(dense, size)[:, None])

        return gained(trial.watched("head output", self.passes(trial.shape), measure), choice)


def _energy(out: Tensor, size: int) -> Tensor:
    """Return the squared norm [U] of each unit's part of out [1, H, N, D]."""
    return out[0].float().square().sum((1, 2)).unflatten(0, (-1, size)).sum(1)
