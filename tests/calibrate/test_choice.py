"""From gains to a choice: within the budget, the best where all cost the same, and a path that only climbs."""

from dataclasses import dataclass, field
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse.calibrate.choice import TOLERANCE, grow, path
from hf_sparse.calibrate.costs import Costs
from hf_sparse.calibrate.request import Search
from hf_sparse.calibrate.scores import Ablation, GateGradient, Score
from hf_sparse.calibrate.units import Units

quick = settings(max_examples=60, deadline=None)


def costs_of(shares, mixed=0.0):
    shares = np.array(shares, dtype=float)
    return Costs("density", 100, shares / shares[..., 0].sum(), 1.0, mixed)


@st.composite
def instances(draw, most=4, equal=False):
    """Costs [L, U, C], dense the costliest, gains, and a budget between cheapest and dense."""
    shape = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(2, most))
    numbers = st.integers(1, 9)
    values = np.array(draw(st.lists(numbers, min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))))
    shares = np.broadcast_to(np.arange(shape[2])[::-1] + 1.0, shape) if equal else values.reshape(shape)
    shares = shares + 0.0
    shares[..., 0] = shares.max(-1) + 1
    gains = st.integers(-3, 20)
    gains = np.array(draw(st.lists(gains, min_size=values.size, max_size=values.size)), float).reshape(shape)
    costs = costs_of(shares, draw(st.sampled_from([0.0, 0.05])) if not equal else 0.0)
    least = costs.of(costs.cheapest)
    return costs, gains, least + draw(st.floats(0, 1)) * max(1 - least, 0)


@quick
@given(instances())
def test_a_budget_is_never_exceeded_and_nothing_is_taken_back(instance):
    costs, gains, budget = instance
    gains = gains - np.take_along_axis(gains, costs.cheapest[..., None], -1)
    grown = grow(costs.cheapest, gains, costs, budget)
    assert costs.of(grown) <= budget + 2 * TOLERANCE
    own, cheap = (
        np.take_along_axis(costs.shares, choice[..., None], -1) for choice in (grown, costs.cheapest)
    )
    assert (own >= cheap - TOLERANCE).all()
    changed = grown != costs.cheapest
    assert (np.take_along_axis(gains, grown[..., None], -1)[..., 0][changed] > 0).all()


@quick
@given(instances(most=2, equal=True))
def test_where_all_changes_cost_the_same_no_choice_gains_more(instance):
    costs, gains, budget = instance
    gains[..., 1] = 0  # the cheapest is the last
    grown = grow(costs.cheapest, gains, costs, budget)
    places = list(np.ndindex(grown.shape))
    best = 0.0
    for numbers in product(range(2), repeat=len(places)):
        choice = np.array(numbers).reshape(grown.shape)
        if costs.of(choice) <= budget + TOLERANCE:
            best = max(best, np.take_along_axis(gains, choice[..., None], -1).sum())
    assert np.take_along_axis(gains, grown[..., None], -1).sum() == pytest.approx(best)


def test_the_largest_gain_for_its_cost_comes_first_and_a_unit_may_change_again():
    costs = costs_of([[[8, 2, 1], [8, 2, 1]]])
    gains = np.array([[[7.0, 4.0, 0.0], [1.0, 0.5, 0.0]]])
    one = 1 / 16
    assert grow(costs.cheapest, gains, costs, 2 * one).tolist() == [[2, 2]]
    assert grow(costs.cheapest, gains, costs, 3 * one).tolist() == [[1, 2]]
    assert grow(costs.cheapest, gains, costs, 9 * one).tolist() == [[0, 2]], "3 for 6 beats 0.5 for 1"
    assert grow(costs.cheapest, gains, costs, 9 * one, most=1).tolist() == [[1, 2]]
    assert grow(costs.cheapest, gains, costs, 1.0).tolist() == [[0, 0]]


def test_a_change_that_does_not_fit_makes_room_for_one_that_does():
    costs = costs_of([[[9, 1], [3, 1]]])
    gains = np.array([[[80.0, 0.0], [1.0, 0.0]]])
    assert grow(costs.cheapest, gains, costs, 5 / 12).tolist() == [[1, 0]]


def test_of_candidates_that_cost_the_same_the_better_is_taken_once_and_dense_is_never_left():
    costs = costs_of([[[4, 1, 1], [2, 2, 1]]])
    assert costs.cheapest.tolist() == [[1, 2]]
    gains = np.array([[[0.0, 0.0, 3.0], [0.0, 9.0, 0.0]]])
    assert grow(costs.cheapest, gains, costs, 2 / 6).tolist() == [[2, 2]]
    back = np.array([[[0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]])
    assert grow(np.array([[2, 2]]), back, costs, 2 / 6).tolist() == [[2, 2]], (
        "or rescoring could go on for ever"
    )
    away = np.array([[[0.0, 0.0, 0.0], [0.0, 5.0, 0.0]]])
    assert grow(np.array([[1, 0]]), away, costs, 1.0).tolist() == [[1, 0]]


def test_what_a_mixed_layer_costs_besides_is_within_the_budget():
    costs = costs_of([[[2, 1], [2, 1]], [[2, 1], [2, 1]]], mixed=0.2)
    gains = np.zeros((2, 2, 2))
    gains[0, 0, 0], gains[1, :, 0] = 2.0, 1.0
    assert grow(costs.cheapest, gains, costs, 0.9).tolist() == [[0, 1], [1, 1]], "0.625 and 0.2, and no more"
    assert grow(costs.cheapest, gains, costs, 0.8).tolist() == [[1, 1], [1, 1]]
    assert costs.of(np.array([[0, 1], [1, 1]])) == pytest.approx(0.625 + 0.2)


@dataclass
class Table:
    """A trial whose losses are of a table, pairs of units included."""

    costs: Costs
    single: np.ndarray
    pair: np.ndarray
    asked: list = field(default_factory=list)

    @property
    def shape(self):
        return self.single.shape

    @property
    def units(self):
        return Units("head", tuple(range(self.shape[0])), self.shape[0], self.shape[1], self.shape[1])

    def value(self, choice):
        self.asked.append(choice.tobytes())
        dense = (choice == 0).flatten().astype(float)
        return float(np.take_along_axis(self.single, choice[..., None], -1).sum() - dense @ self.pair @ dense)


def exact_greedy(table, budgets):
    """An independent search: of all changes of one unit that fit and gain, the best for its cost, until none does."""
    choice, found = table.costs.cheapest.copy(), []
    for budget in budgets:
        while True:
            best = None
            for place in np.ndindex(table.shape):
                changed = choice.copy()
                changed[place[:2]] = place[2]
                cost = table.costs.of(changed) - table.costs.of(choice)
                gain = table.value(choice) - table.value(changed)
                fits = table.costs.of(changed) <= budget + TOLERANCE
                if cost > TOLERANCE and gain > 1e-12 and fits and (best is None or gain / cost > best[0]):
                    best = gain / cost, changed
            if best is None:
                break
            choice = best[1]
        found.append(choice)
    return found


@quick
@given(st.integers(0, 10_000))
def test_rescoring_by_unit_is_the_exact_greedy_search(seed):
    random = np.random.default_rng(seed)
    shape = (2, 2, 3)
    pair = random.random((4, 4)) * random.integers(0, 3)
    costs = costs_of(np.sort(random.random(shape), -1)[..., ::-1] + 0.1)
    single = random.random(shape)
    table = Table(costs, single, pair)
    search = Search(Ablation(), "unit", 2, 2)
    least = costs.of(costs.cheapest)
    budgets = search.budgets(least, (least + 1) / 2)
    found = list(path(table, search.score, budgets, search.rescore))
    taken = len(set(table.asked))
    assert [choice.tolist() for choice in found] == [
        choice.tolist() for choice in exact_greedy(table, budgets)
    ]
    assert taken <= search.passes(shape, False), "what is measured twice counts once"


@dataclass(frozen=True)
class Fickle(Score):
    """Says of every other candidate that it is better."""

    def passes(self, shape):
        return 1.0

    def gains(self, trial, choice):
        gains = np.ones(trial.shape)
        np.put_along_axis(gains, choice[..., None], 0.0, -1)
        return gains


@pytest.mark.parametrize("rescore", [True, "unit"])
def test_a_score_that_changes_its_mind_comes_to_an_end(rescore):
    costs = costs_of(np.broadcast_to([3.0, 1.0, 1.0, 1.0], (2, 2, 4)))
    table = Table(costs, np.zeros((2, 2, 4)), np.zeros((4, 4)))
    choices = list(path(table, Fickle(), [costs.of(costs.cheapest), 0.7, 1.0], rescore))
    assert len(choices) == 3 and (choices[-1] == 0).all()


@pytest.mark.parametrize(("rescore", "times"), [(True, [[1, 1], [0, 1]]), (False, [[1, 1]])])
def test_the_score_is_taken_anew_at_every_stage_or_once(rescore, times):
    asked = []

    @dataclass(frozen=True)
    class Asked(Fickle):
        def gains(self, trial, choice):
            asked.append(choice[0].tolist())
            return super().gains(trial, choice)

    costs = costs_of([[[2.0, 1.0], [2.0, 1.0]]])
    table = Table(costs, np.zeros((1, 2, 2)), np.zeros((2, 2)))
    found = list(path(table, Asked(), [0.75, 1.0], rescore))
    assert [choice.tolist() for choice in found] == [[[0, 1]], [[0, 0]]] and asked == times


@quick
@given(st.floats(0.01, 0.99), st.floats(0.001, 1), st.integers(1, 6), st.integers(0, 5))
def test_budgets_climb_to_the_one_asked_for_and_on(least, share, stages, beyond):
    budget = least + share * (1 - least)
    budgets = Search(GateGradient(), True, stages, beyond).budgets(least, budget)
    assert budgets == sorted(budgets) and all(value <= 1 + 1e-9 for value in budgets)
    assert budgets[stages - 1] == pytest.approx(budget)
    assert len(budgets) == stages + (beyond if budget < 1 else 0)
