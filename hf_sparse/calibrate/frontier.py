"""The frontier: the choices on the way to a budget and beyond, each measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .choice import path
from .costs import Costs
from .request import Search
from .result import Point
from .trial import Trial


@dataclass(frozen=True, eq=False)
class Frontier:
    """What a search found.

    points: the cheapest choice, those of all stages that differ, and dense, ascending in cost.
    chosen: the choice at the budget.
    uniform: every candidate in all units, dense first.
    gains: float [L, U, C], the score's gains over the cheapest choice.
    choosing: forward passes per window until the choice was made.
    """

    points: tuple[Point, ...]
    chosen: Point
    uniform: tuple[Point, ...]
    gains: np.ndarray
    choosing: float


def find_frontier(trial: Trial, density: Costs, search: Search, budget: float) -> Frontier:
    """Make the choice of every stage of the search, then measure them all, and every candidate alone.

    density: costs by which the density of a point is told, whatever the budget counts.
    """
    trial.read_dense()
    cheapest = trial.costs.cheapest

    def point(label: str, choice: np.ndarray) -> Point:
        return Point(label, choice, trial.costs.of(choice), density.of(choice), trial.values(choice))

    budgets = search.budgets(trial.costs.of(cheapest), budget)
    choices: list[np.ndarray] = []
    choosing = 0.0
    for choice in path(trial, search.score, budgets, search.rescore):
        choices.append(choice)
        if len(choices) == search.stages:
            choosing = trial.ledger.passes
    uniform = tuple(
        point(str(candidate), np.full(trial.units.shape, number))
        for number, candidate in enumerate(trial.gated.candidates)
    )
    points = [point("cheapest", cheapest)]
    for wanted, choice in zip(budgets, choices, strict=True):
        if (choice != points[-1].choice).any():
            points.append(point(f"budget {wanted:.4g}", choice))
    if (points[-1].choice != trial.dense).any():
        points.append(uniform[0])
    chosen = point(f"budget {budgets[search.stages - 1]:.4g}", choices[search.stages - 1])
    return Frontier(tuple(points), chosen, uniform, search.score.gains(trial, cheapest), choosing)
