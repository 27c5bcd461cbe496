"""Scores that know the loss against patched models and finite differences; what all scores have in common."""

import numpy as np
import pytest
import torch
from tiny_models import random_model, tiny

from hf_sparse import Full, SlidingWindow, StreamingLLM, patch_model
from hf_sparse.calibrate.scores import (
    SCORES,
    Ablation,
    AblationFromDense,
    GateGradient,
    LearnedGates,
    Score,
    score_class,
)
from hf_sparse.calibrate.scores.base import register_score

from .trials import CANDIDATES, random_choice, trial

KINDS = ["head", "kv_head", "layer"]


@pytest.mark.parametrize(("name", "kind"), [("llama", "kv_head"), ("bert", "layer")])
def test_ablation_is_the_loss_of_the_patched_model(name, kind):
    made = trial(tiny(name), kind)
    choice = random_choice(made)
    gains = Ablation().gains(made, choice)

    def patched(which):
        model = patch_model(tiny(name), made.units.pattern(which, CANDIDATES))
        values = []
        for window in made.objective.windows:
            with torch.no_grad():
                logits = model(input_ids=window.ids).logits[0]
            values.append(float(torch.nn.functional.cross_entropy(logits, window.targets[0])))
        return np.mean(values)

    for place in np.ndindex(made.shape):
        changed = choice.copy()
        changed[place[:2]] = place[2]
        assert gains[place] == pytest.approx(patched(choice) - patched(changed), abs=2e-5)


def test_ablation_from_dense_changes_one_unit_of_the_dense_model():
    made = trial(tiny("llama"))
    choice = np.ones((2, 4), int)
    gains = AblationFromDense().gains(made, choice)
    for layer, unit in np.ndindex(2, 4):
        alone = made.dense
        alone[layer, unit] = 1
        other = made.dense
        other[layer, unit] = 2
        assert gains[layer, unit, 0] == pytest.approx(made.value(alone) - made.value(made.dense))
        assert gains[layer, unit, 2] == pytest.approx(made.value(alone) - made.value(other))
        assert gains[layer, unit, 1] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_gate_gradient_is_what_a_little_more_of_a_candidate_changes(kind):
    made = trial(tiny("llama"), kind)
    choice = np.ones(made.units.shape, int)
    gains = GateGradient().gains(made, choice)
    assert (np.take_along_axis(gains, choice[..., None], -1) == 0).all()
    step = 3e-3
    for place in np.ndindex(made.shape):
        gates = made.one_hot(choice)
        gates[place] += step
        gates[place[0], place[1], 1] -= step
        with made.gated.mixing(torch.tensor(gates, dtype=torch.float32)):
            after = np.mean([made.objective.value(number) for number in range(2)])
        assert gains[place] * step == pytest.approx(made.value(choice) - after, abs=2e-3 * step + 3e-5)


def test_gate_gradient_takes_the_mean_of_its_points():
    made = trial(tiny("llama"))
    choice = np.ones((2, 4), int)
    at = [GateGradient((point,)).gains(made, choice) for point in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose(GateGradient((0.0, 0.5, 1.0)).gains(made, choice), np.mean(at, 0), atol=1e-12)
    np.testing.assert_allclose(
        at[2][..., 0], (lambda g: g[..., 1] - g[..., 0])(made.gradient(made.one_hot(made.dense))), atol=1e-12
    )
    many = np.mean(
        [GateGradient((point,)).gains(made, choice)[..., 0].sum() for point in np.linspace(0.05, 0.95, 10)]
    )
    assert many == pytest.approx(made.value(choice) - made.value(made.dense), rel=0.05), (
        "integrated, they add up"
    )


@pytest.mark.parametrize("points", [(), (1.5,), (-0.1,)])
def test_points_lie_between_the_choice_and_dense(points):
    with pytest.raises(ValueError, match=r"points must be numbers from 0 \(the choice\) to 1 \(dense\), got"):
        GateGradient(points)


def test_learned_gates_close_where_the_window_is_enough():
    model = tiny("gpt2")
    with torch.no_grad():  # only head 2 of layer 1 still gives anything
        for number, block in enumerate(model.transformer.h):
            weight = block.attn.c_proj.weight.view(4, 8, 32)
            weight[[head for head in range(4) if (number, head) != (1, 2)]] = 0
        model.transformer.h[1].attn.c_proj.weight.mul_(3)
    made = trial(model, candidates=(Full(), SlidingWindow(1)))
    choice = made.costs.cheapest
    gains = LearnedGates(steps=30, penalty=1e-3).gains(made, choice)[..., 0]
    exact = Ablation().gains(made, choice)[..., 0]
    assert abs(exact[1, 2]) > 0.02
    wanted = np.zeros((2, 4), bool)
    wanted[1, 2] = exact[1, 2] > 0
    assert wanted.any() and ((gains > 0.3) == wanted).all()
    assert (LearnedGates(steps=12, penalty=1e3).gains(made, choice)[..., 0] == 0).all()


def test_learned_gates_place_other_candidates_by_their_cost():
    made = trial(tiny("llama"), candidates=(Full(), SlidingWindow(2), SlidingWindow(6)))
    choice = made.costs.cheapest
    assert (choice == 1).all()
    gains = LearnedGates(steps=2, rate=0.05).gains(made, choice)
    assert (gains[..., 0] > gains[..., 2]).all() and (gains[..., 2] > 0).all() and (gains[..., 1] == 0).all()
    np.testing.assert_allclose(gains[..., 2], gains[..., 0] * made.costs.openness[..., 2])


@pytest.mark.parametrize("score", [cls() for cls in SCORES.values()], ids=lambda score: score.name)
@pytest.mark.parametrize(
    "candidates", [CANDIDATES[:2], (*CANDIDATES, StreamingLLM(sinks=2, window=3))], ids=len
)
def test_a_score_takes_as_many_passes_as_it_says(score, candidates):
    made = trial(tiny("llama"), "kv_head", candidates=candidates, count=1, length=9)
    if isinstance(score, LearnedGates):
        score = LearnedGates(steps=3)
    choice = made.costs.cheapest
    gains = score.gains(made, choice)
    assert gains.shape == made.shape and (np.take_along_axis(gains, choice[..., None], -1) == 0).all()
    assert made.ledger.passes <= score.passes(made.shape)
    assert made.ledger.passes == score.passes(made.shape) or isinstance(score, LearnedGates)
    again = score.gains(made, choice)
    assert (again == gains).all() and made.ledger.passes <= score.passes(made.shape), (
        "nothing is measured twice"
    )


@pytest.mark.parametrize("score", [cls() for cls in SCORES.values()], ids=lambda score: score.name)
def test_one_layer_with_one_head_and_one_window(score):
    options = {"vocab_size": 64, "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 32}
    model = random_model("GPT2LMHeadModel", {**options, "bos_token_id": 2, "eos_token_id": None})
    made = trial(model, candidates=(Full(), SlidingWindow(1)), count=1, length=7)
    if isinstance(score, LearnedGates):
        score = LearnedGates(steps=2)
    gains = score.gains(made, np.array([[1]]))
    assert gains.shape == (1, 1, 2) and np.isfinite(gains).all() and gains[0, 0, 0] != 0


def test_scores_are_known_by_name():
    assert score_class("ablation") is Ablation and {"gate_gradient", "learned_gates"} <= SCORES.keys()
    with pytest.raises(
        ValueError, match=r"unknown score 'gate_gradent'. Did you mean 'gate_gradient'\? Available: abl"
    ):
        score_class("gate_gradent")
    with pytest.raises(ValueError, match="score 'ablation' is already Ablation; pick another name"):
        register_score("ablation")(Score)


def test_a_score_is_called_by_its_name_and_by_options_that_are_not_the_default():
    assert str(GateGradient()) == "gate_gradient" and str(Ablation()) == "ablation"
    assert str(LearnedGates(steps=2, rate=0.1)) == "learned_gates(steps=2)"


def test_a_score_of_ones_own_must_say_how():
    with pytest.raises(NotImplementedError, match=r"Score must define passes\(shape\)"):
        Score().passes((1, 1, 2))
    with pytest.raises(NotImplementedError, match=r"Score must define gains\(trial, choice\)"):
        Score().gains(None, np.zeros((1, 1), int))
