"""The attention weight that dense attention puts on keys which a candidate leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...patterns import Pattern
from ..gated import LayerCall
from ..trial import Trial
from .base import Score, gained, register_score

ROWS = 128  # queries whose weights [H, ROWS, N] are held at a time


@register_score("attention_mass")
@dataclass(frozen=True)
class AttentionMass(Score):
    """One dense pass; the mean over queries and heads of the weight that falls on keys a candidate does not allow."""

    sees_choice = False

    def passes(self, shape: tuple[int, int, int]) -> float:
        return 2.0  # the weights are computed a second time

    def gains(self, trial: Trial, choice: np.ndarray) -> np.ndarray:
        candidates, size = trial.gated.candidates, trial.units.size

        def measure(seen: LayerCall) -> Tensor:
            return lost_mass(seen, candidates).unflatten(0, (-1, size)).mean(1)

        return gained(trial.watched("attention mass", self.passes(trial.shape), measure), choice)


def lost_mass(seen: LayerCall, candidates: Sequence[Pattern]) -> Tensor:
    """Return [H, C]: for each head the mean over queries of the dense weight on keys that a candidate leaves out."""
    query, call = seen.asked.query[0], seen.asked.call
    heads, n, size = query.shape
    key = seen.asked.key[0].repeat_interleave(heads // seen.asked.key.shape[1], 0).float().mT
    scale = size**-0.5 if call.scale is None else call.scale
    contexts = [call.constraint.context(one, layer=call.layer, heads=heads, length=n) for one in candidates]
    head = torch.arange(heads, device=query.device)[:, None, None]
    column = torch.arange(n, device=query.device)
    total = query.new_zeros(heads, len(candidates), dtype=torch.float32)
    for begin in range(0, n, ROWS):
        row = column[begin : begin + ROWS, None]
        scores = (query[:, begin : begin + ROWS].float() @ key) * scale
        if call.softcap is not None:
            scores = call.softcap * (scores / call.softcap).tanh()
        admitted = call.constraint.admits(row, column)
        scores = scores.masked_fill(~admitted, float("-inf"))
        if seen.asked.sinks is not None:
            scores = torch.cat(
                (scores, seen.asked.sinks.float()[:, None, None].expand(heads, len(row), 1)), -1
            )
        weights = scores.softmax(-1)[..., :n]
        for number, (candidate, context) in enumerate(zip(candidates, contexts, strict=True)):
            allowed = call.constraint.allowed(candidate, context, head, row, column)
            total[:, number] += (weights * ~allowed).sum((1, 2))
    return total / n
