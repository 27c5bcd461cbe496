"""From gains and costs to a choice: the path of choices that grows from the cheapest one to a budget, and beyond."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .costs import Costs
from .gated import DENSE
from .scores.base import Score
from .trial import Trial

TOLERANCE = 1e-9  # of costs, which are sums of many shares


def grow(
    choice: np.ndarray, gains: np.ndarray, costs: Costs, budget: float, most: int | None = None
) -> np.ndarray:
    """Return the choice [L, U] that spends up to `budget` on what gains most for its cost.

    The greedy solution of the knapsack: of all changes of one unit to a costlier candidate, the one with the largest
    gain per cost that fits comes first, and a unit may change again. Where all changes cost the same, no other choice
    has a larger sum of gains. Changes that gain nothing are not made, and none is taken back: once a unit has what it
    needs, its gradient says little. Of candidates that cost the same a unit may go to a later one, never back, and
    never away from dense.

    Args:
        choice: int [L, U], where it begins.
        gains: float [L, U, C], of changing one unit of `choice` to each candidate.
        most: changes to make; None for all that fit.
    """
    choice = choice.copy()
    spent = costs.of(choice)
    changes = 0
    numbers = np.arange(gains.shape[-1])
    while most is None or changes < most:
        gain = gains - np.take_along_axis(gains, choice[..., None], -1)
        cost = costs.shares - np.take_along_axis(costs.shares, choice[..., None], -1)
        own = choice[..., None]
        up = (cost > TOLERANCE) | ((cost >= -TOLERANCE) & (numbers > own) & (own != DENSE))
        fits = (gain > 0) & up & (spent + cost <= budget + TOLERANCE)
        worth = np.where(fits, gain / np.maximum(cost, TOLERANCE), -np.inf)
        while fits.any():
            place = np.unravel_index(worth.argmax(), worth.shape)
            changed = choice.copy()
            changed[place[:2]] = place[2]
            if costs.of(changed) <= budget + TOLERANCE:
                break
            fits[place], worth[place] = False, -np.inf  # what a mixed layer costs besides does not fit
        else:
            return choice
        choice, spent, changes = changed, costs.of(changed), changes + 1
    return choice


def path(trial: Trial, score: Score, budgets: list[float], rescore: bool | str) -> Iterator[np.ndarray]:
    """Yield the choice [L, U] of every budget, ascending; each grows out of the one before.

    rescore: take the score anew for every budget; "unit" for every change (with `Ablation` that is the exact greedy
        search); False for once.
    """
    choice = trial.costs.cheapest
    gains = None
    for budget in budgets:
        if rescore == "unit":
            while True:
                grown = grow(choice, score.gains(trial, choice), trial.costs, budget, most=1)
                if (grown == choice).all():
                    break
                choice = grown
        else:
            if gains is None or rescore:
                gains = score.gains(trial, choice)
            choice = grow(choice, gains, trial.costs, budget)
        yield choice
