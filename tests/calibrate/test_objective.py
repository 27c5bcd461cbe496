"""The figure of a window is what the evaluation measures, and its gradient does not depend on the chunks."""

import numpy as np
import pytest
import torch
from tiny_models import tiny

from hf_sparse.evaluate import scoring
from hf_sparse.evaluate.head import ChunkedHead
from hf_sparse.evaluate.windows import Window as Scored

from .trials import gated, random_choice, trial, windows

CPU = torch.device("cpu")


def logits(model, window):
    with torch.no_grad():
        return model(input_ids=window.ids).logits[0].double()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_loss_is_what_the_evaluation_scores(name):
    model = tiny(name)
    made = trial(model)
    window = made.objective.windows[0]
    whole = np.concatenate((window.ids[0].numpy(), window.targets[0, -1:].numpy()))
    scorer = scoring.CausalScorer(ChunkedHead(model, 1000), CPU)
    with torch.no_grad():
        nats = scorer.nats([(whole, Scored(0, len(whole), 1))])[0]
    assert made.objective.value(0) == pytest.approx(nats.mean(), rel=1e-6)


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_an_encoder_is_judged_by_the_masked_tokens_alone(name):
    model = tiny(name)
    made = trial(model)
    window = made.objective.windows[0]
    at = (window.targets[0] != -100).nonzero()[:, 0]
    assert len(at) == 4
    expected = torch.nn.functional.cross_entropy(logits(model, window)[at], window.targets[0, at])
    assert made.objective.value(0) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_divergence_is_that_of_the_definition(name):
    model = tiny(name)
    made = trial(model, objective="kl")
    assert made.values(made.dense) == pytest.approx([0, 0], abs=1e-7)
    choice = random_choice(made.gated)
    found = made.values(choice)
    for number, window in enumerate(made.objective.windows):
        dense = logits(model, window).log_softmax(-1)
        with made.gated.choosing(choice):
            own = logits(model, window).log_softmax(-1)
        apart = (dense.exp() * (dense - own)).sum(-1)[window.targets[0] != -100]
        assert found[number] == pytest.approx(float(apart.mean()), rel=1e-5)


@pytest.mark.parametrize("kind", ["loss", "kl"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_chunks_change_neither_value_nor_gradient(name, kind):
    found = []
    for chunk in (1000, 3, 1):
        made = trial(tiny(name), objective=kind, chunk=chunk)
        gates = torch.full((2, 4, 3), 1 / 3, requires_grad=True)
        with made.gated.mixing(gates):
            value = made.objective.backward(1)
            assert value == pytest.approx(made.objective.value(1), rel=1e-6)
        found.append((value, gates.grad))
    for value, gradient in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-6, rtol=1e-4)


def test_the_gradient_is_that_of_the_loss_itself():
    model = tiny("llama")
    made = trial(model)
    window = made.objective.windows[0]
    gates = [torch.full((2, 4, 3), 1 / 3, requires_grad=True) for _ in range(2)]
    with made.gated.mixing(gates[0]):
        made.objective.backward(0)
    with gated(model).mixing(gates[1]):
        output = model(input_ids=window.ids).logits[0]
        torch.nn.functional.cross_entropy(output, window.targets[0]).backward()
    torch.testing.assert_close(gates[0].grad, gates[1].grad, atol=1e-6, rtol=1e-4)


def test_figures_of_extreme_weights_stay_finite():
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(1e4)
        model.lm_head.weight.mul_(100)
    made = trial(model, objective="kl")
    assert np.isfinite(made.values(random_choice(made.gated))).all()
    assert np.isfinite(made.gradient(made.one_hot(random_choice(made.gated)))).all()


def test_a_figure_that_is_not_finite_ends_with_the_cure():
    model = tiny("llama")
    model.lm_head.weight.data.mul_(float("inf"))
    made = trial(model)
    with pytest.raises(
        ValueError, match="not finite, so the model gave no usable figure there; try another dtype"
    ):
        made.values(made.dense)


def test_windows_of_a_trial_are_those_of_its_kind():
    causal, masked = windows(), windows(masked=True)
    assert (causal[0].targets != -100).all() and (masked[0].targets == -100).sum() == 13
