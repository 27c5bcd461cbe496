"""The model on trial: what it loses under a choice, and which way it would lose less."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .costs import Costs
from .gated import DENSE, Gated, LayerCall
from .ledger import Ledger
from .objective import Objective
from .units import Units

GRADIENT_PASSES = 3.0  # a forward pass and a backward pass, which is about two


@dataclass(frozen=True, eq=False)
class Trial:
    """A model, its candidates, their costs and its texts; every figure is kept in the ledger."""

    gated: Gated
    objective: Objective
    ledger: Ledger
    costs: Costs

    @property
    def units(self) -> Units:
        return self.gated.units

    @property
    def shape(self) -> tuple[int, int, int]:
        """[L, U, C]."""
        return *self.units.shape, len(self.gated.candidates)

    @property
    def dense(self) -> np.ndarray:
        """The choice [L, U] in which every unit is dense."""
        return np.full(self.units.shape, DENSE)

    def read_dense(self) -> None:
        """Read every window with the dense model, where the objective is held against it."""
        if self.objective.needs_dense:
            with self.gated.choosing(self.dense):
                for number in self.ledger.mine:
                    self.objective.read_dense(number)

    def values(self, choice: np.ndarray) -> np.ndarray:
        """Return the objective of each window, float64 [windows], under a choice [L, U]."""
        found = self.ledger.figures(
            f"{self.objective.kind} {_code(choice)}",
            1.0,
            lambda: self.gated.choosing(choice),
            self.objective.value,
        )
        return np.array(found)

    def value(self, choice: np.ndarray) -> float:
        """Return the mean of `values`."""
        return float(self.values(choice).mean())

    def gradient(self, gates: np.ndarray) -> np.ndarray:
        """Return the gradient [L, U, C] of the mean objective at the mixture `gates` [L, U, C]."""
        tensor = torch.tensor(gates, dtype=torch.float32, requires_grad=True)

        def figure(number: int) -> list[float]:
            tensor.grad = None
            with torch.enable_grad():
                self.objective.backward(number)
            assert tensor.grad is not None
            return [float(f"{value:.6g}") for value in tensor.grad.flatten().tolist()]

        found = self.ledger.figures(
            f"gradient of {self.objective.kind} {_code(gates)}",
            GRADIENT_PASSES,
            lambda: self.gated.mixing(tensor),
            figure,
        )
        return np.mean(found, 0).reshape(self.shape)

    def watched(self, step: str, passes: float, measure: Callable[[LayerCall], Tensor]) -> np.ndarray:
        """Return the mean over windows of what `measure` gives of each layer's call of the dense model, [L, U, C].

        measure: gets a LayerCall and returns float [U, C].
        """
        rows: dict[int, Tensor] = {}

        def watch(seen: LayerCall) -> None:
            rows[seen.layer] = measure(seen).cpu()  # layers may lie on several devices

        def figure(number: int) -> list[float]:
            rows.clear()
            with torch.no_grad():
                self.objective.states(number)
            whole = torch.stack([rows[layer] for layer in range(self.shape[0])])
            return [float(f"{value:.6g}") for value in whole.flatten().tolist()]

        found = self.ledger.figures(step, passes, lambda: self.gated.watching(watch), figure)
        return np.mean(found, 0).reshape(self.shape)

    def one_hot(self, choice: np.ndarray) -> np.ndarray:
        """Return the gates [L, U, C] of a choice [L, U]."""
        return np.eye(self.shape[2])[choice]


def _code(array: np.ndarray) -> str:
    """Return what tells an array from others, short."""
    plain = np.ascontiguousarray(array, dtype=np.float64)
    return hashlib.sha256(plain.tobytes()).hexdigest()[:24]
