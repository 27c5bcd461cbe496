"""A model under choices and mixtures equals the same model patched, and is afterwards what it was."""

import copy

import numpy as np
import pytest
import torch
from tiny_models import tiny, tokens

import hf_sparse
from hf_sparse import Full, SlidingWindow, patch_model
from hf_sparse.backends import attend
from hf_sparse.calibrate.gated import _Mixture
from hf_sparse.hf import computed

from .trials import CANDIDATES, gated, hybrid, random_choice

NAMES = [
    "llama",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt_neox",
    "opt",
    "bert",
    "roberta",
    "modernbert",
]
CLOSE = {"atol": 1e-6, "rtol": 1e-6}


def run(model, ids=None):
    with torch.no_grad():
        return model(input_ids=tokens(1, 23) if ids is None else ids).logits


def state(model):
    """Return everything of a model that a calibration could leave changed."""
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "requires_grad": {name: weight.requires_grad for name, weight in model.named_parameters()},
        "training": [module.training for module in model.modules()],
        "config": copy.deepcopy(model.config.to_dict()),
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
    }


def assert_same_state(before, after):
    for name in before["weights"].keys() | after["weights"].keys():
        assert torch.equal(before["weights"][name], after["weights"][name]), name
    for key in ("requires_grad", "training", "config", "attributes", "hooks"):
        assert before[key] == after[key], key


@pytest.mark.parametrize("kind", ["head", "kv_head", "layer"])
@pytest.mark.parametrize("name", NAMES)
def test_a_choice_gives_the_logits_of_the_patched_model(name, kind):
    model = tiny(name)
    own, dense = gated(model, kind), run(model)
    choice = random_choice(own, seed=3)
    choice[-1, -1] = 1
    with own.choosing(choice):
        chosen = run(model)
    patched = run(patch_model(tiny(name), own.units.pattern(choice, CANDIDATES)))
    torch.testing.assert_close(chosen, patched, **CLOSE)
    assert (chosen - dense).abs().max() > 0.1
    assert torch.equal(run(model), dense)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_model_is_afterwards_what_it_was(name):
    model = tiny(name).train()
    model.get_output_embeddings().weight.requires_grad_(False)
    before, own = state(model), gated(model)
    with own.choosing(random_choice(own)):
        run(model)
    with own.mixing(torch.full((2, 4, 3), 1 / 3)):
        run(model)
    with pytest.raises(KeyboardInterrupt), own.watching(lambda seen: None):
        raise KeyboardInterrupt
    assert_same_state(before, state(model))


def test_a_patched_model_keeps_its_pattern():
    model = patch_model(tiny("llama"), "streaming_llm", sinks=2, window=4, backend="torch", layers=[1])
    before, own, logits = state(model), gated(model), run(model)
    choice = random_choice(own)
    with own.choosing(choice):
        chosen = run(model)
    expected = run(patch_model(tiny("llama"), own.units.pattern(choice, CANDIDATES)))
    torch.testing.assert_close(chosen, expected, **CLOSE)
    assert_same_state(before, state(model))
    assert torch.equal(run(model), logits)


def test_two_models_do_not_meet():
    first, second = tiny("llama"), tiny("gpt2")
    dense = run(second)
    with gated(first).choosing(np.ones((2, 4), int)):
        assert torch.equal(run(second), dense)
        with gated(second).choosing(np.ones((2, 4), int)):
            assert not torch.equal(run(second), dense)
            narrow = run(first)
    torch.testing.assert_close(narrow, run(patch_model(tiny("llama"), CANDIDATES[1])), **CLOSE)


def test_an_adapter_takes_part():
    from peft import LoraConfig, get_peft_model

    def adapted():
        base = tiny("llama")
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        return get_peft_model(base, config).eval()

    model, patched = adapted(), adapted()
    own, dense = gated(model), run(model)
    choice = random_choice(own)
    with own.choosing(choice):
        chosen = run(model)
    patch_model(patched, own.units.pattern(choice, CANDIDATES))
    torch.testing.assert_close(chosen, run(patched), **CLOSE)
    assert (dense - run(tiny("llama"))).abs().max() > 0.1, "the adapter changes something"
    assert torch.equal(run(model), dense)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_candidates_run_on_the_backend_that_was_asked_for(backend):
    model = tiny("llama")
    own = gated(model, backend=backend)
    with own.choosing(np.ones((2, 4), int)), hf_sparse.recording() as recorder:
        run(model)
    assert {call.backend for call in recorder.calls} == {backend}


def test_low_precision_and_a_layer_without_attention():
    for model in (hybrid(2), tiny("llama").bfloat16()):
        own, copied = gated(model), copy.deepcopy(model)
        choice = random_choice(own)
        with own.choosing(choice):
            chosen = run(model)
        assert torch.equal(chosen, run(patch_model(copied, own.units.pattern(choice, CANDIDATES))))


def test_a_model_whose_attention_does_not_know_its_layer_is_refused():
    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.layer_idx = None
    with (
        pytest.raises(ValueError, match="does not know which layer it is"),
        gated(model).choosing(np.ones((2, 4), int)),
    ):
        pass


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
def test_gates_that_are_one_or_zero_are_a_choice(name):
    model = tiny(name)
    own = gated(model, "kv_head")
    choice = random_choice(own, seed=1)
    with own.choosing(choice):
        chosen = run(model)
    with own.mixing(torch.tensor(np.eye(3)[choice], dtype=torch.float32)):
        torch.testing.assert_close(run(model), chosen, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["head", "layer"])
@pytest.mark.parametrize("point", ["one-hot", "inside"])
def test_the_gradient_of_every_gate_is_that_of_finite_differences(kind, point):
    model = tiny("gpt2").double().requires_grad_(False)  # the norms of Llama go through float32
    own, ids = gated(model, kind), tokens(1, 9)
    shape = (*own.units.shape, len(CANDIDATES))
    at = np.eye(3)[random_choice(own)] if point == "one-hot" else np.random.default_rng(0).random(shape)
    gates = torch.tensor(at, requires_grad=True)

    def figure():
        return model(input_ids=ids).logits.log_softmax(-1)[0, :, 7].sum()

    with own.mixing(gates):
        figure().backward()
    step, moved = 1e-5, gates.detach().clone()
    for place in np.ndindex(shape):
        values = []
        for sign in (1, -1):
            moved[place] = gates.detach()[place] + sign * step
            with torch.no_grad(), own.mixing(moved):
                values.append(float(figure()))
        moved[place] = gates.detach()[place]
        # Without a gradient through candidates at 0 a gate's own is exact: it does not move the others.
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(
            float(gates.grad[place]), rel=1e-5, abs=1e-7
        )
    assert (gates.grad != 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_gradient_is_that_of_the_plain_sum(monkeypatch, dtype):
    model = tiny("gpt2").to(dtype).requires_grad_(False)
    own, ids = gated(model), tokens(1, 15)
    at = torch.tensor(np.random.default_rng(0).random((2, 4, 3)), dtype=torch.float64)
    at[0, :, 2] = 0.0
    gates = at.float().requires_grad_()
    found = []
    for plain in (False, True):
        if plain:

            def summed(weights, mixed, *outs):
                return sum(weights[:, c, None, None].to(out.dtype) * out for c, out in enumerate(outs))

            monkeypatch.setattr(_Mixture, "apply", summed)
        gates.grad = None
        with own.mixing(gates):
            model(input_ids=ids).logits.float().log_softmax(-1)[0, :, 7].mean().backward()
        assert gates.grad.dtype == torch.float32
        found.append(gates.grad.clone())
    scale = found[1].abs().max()
    tolerance = {torch.float64: 1e-6, torch.bfloat16: 4e-2}[dtype]  # of bfloat16 2^-8 per operation
    assert (found[0] - found[1]).abs().max() <= tolerance * scale


def test_candidates_that_no_unit_mixes_in_are_computed_without_a_graph(monkeypatch):
    graphs = []

    def seen(*args):
        graphs.append(torch.is_grad_enabled())
        return attend(*args)

    monkeypatch.setattr(computed, "attend", seen)
    model = tiny("llama").requires_grad_(False)
    own = gated(model, candidates=(Full(), SlidingWindow(2)))
    gates = torch.zeros(2, 4, 2)
    gates[..., 0] = 1
    gates.requires_grad_()
    with own.mixing(gates), hf_sparse.recording() as recorder:
        graphs.clear()  # patching has tried the model, without a graph
        model(input_ids=tokens(1, 9)).logits.sum().backward()
    assert len(recorder.calls) == 4, "two layers, two candidates"
    assert graphs == [True, False] * 2
    assert (gates.grad[..., 1] != 0).all() and (gates.grad[..., 0] != 0).all()
