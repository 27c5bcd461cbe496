"""Scores of one dense pass against brute force: dense weights, and outputs written out."""

import numpy as np
import pytest
import torch
from tiny_models import native_constraint, tiny

from hf_sparse.calibrate.scores import AttentionMass, HeadOutput, LayerOutput, attention_mass

from .trials import CANDIDATES, trial

KINDS = ["head", "kv_head", "layer"]


def losses(made, score):
    """Return what each candidate loses by a score of one dense pass, [L, U, C]."""
    return -score.gains(made, made.dense)


def adapted(name, *targets):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(
        tiny(name), LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)
    ).eval()


def dense_weights(name, window):
    """Return the weights [L, H, N, N] of the eager model."""
    with torch.no_grad():
        made = tiny(name, "eager")(input_ids=window.ids, output_attentions=True)
    return torch.stack(made.attentions)[:, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mistral", "bert"])
def test_attention_mass_is_the_dense_weight_on_keys_left_out(name, kind, monkeypatch):
    monkeypatch.setattr(attention_mass, "ROWS", 5)
    made = trial(tiny(name), kind)
    lost = []
    for window in made.objective.windows:
        weights = dense_weights(name, window)
        n = weights.shape[-1]
        causal = native_constraint(name, "full_attention").causal
        masks = [candidate.mask(n, causal=causal)[0] for candidate in CANDIDATES]
        lost.append(torch.stack([(weights * ~mask).sum(-1).mean(-1) for mask in masks], -1))
    expected = torch.stack(lost).mean(0).unflatten(1, (made.units.count, -1)).mean(2)
    found = losses(made, AttentionMass())
    torch.testing.assert_close(torch.tensor(found).float(), expected, atol=2e-6, rtol=1e-4)
    assert (found[..., 0] == 0).all() and found.max() > 0.05


def head_outputs(name, model, window):
    """Return the attention [L, N, H, D] under every candidate, of layers that get what the dense model gives them."""
    seen = []
    made = trial(model)
    with (
        torch.no_grad(),
        made.gated.watching(
            lambda call: seen.append([call.attend(one)[0].transpose(0, 1).double() for one in CANDIDATES])
        ),
    ):
        model(input_ids=window.ids)
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_head_output_is_the_share_of_its_energy(name, kind):
    made = trial(tiny(name), kind, count=1)
    outputs = head_outputs(name, tiny(name), made.objective.windows[0])
    found = losses(made, HeadOutput())
    for layer, unit, candidate in np.ndindex(made.shape):
        own = slice(unit * made.units.size, (unit + 1) * made.units.size)
        dense, other = (outputs[layer][number][:, own] for number in (0, candidate))
        expected = (other - dense).square().sum() / dense.square().sum()
        assert found[layer, unit, candidate] == pytest.approx(float(expected), rel=1e-4, abs=1e-10)


MODELS = {
    "llama": (lambda: tiny("llama"), lambda m, i: m.model.layers[i].self_attn.o_proj),
    "gemma2": (lambda: tiny("gemma2"), lambda m, i: m.model.layers[i].self_attn.o_proj),
    "gpt2": (lambda: tiny("gpt2"), lambda m, i: m.transformer.h[i].attn.c_proj),
    "opt": (lambda: tiny("opt"), lambda m, i: m.model.decoder.layers[i].self_attn.out_proj),
    "bert": (lambda: tiny("bert"), lambda m, i: m.bert.encoder.layer[i].attention.output.dense),
    "lora": (
        lambda: adapted("llama", "q_proj", "o_proj"),
        lambda m, i: m.base_model.model.model.layers[i].self_attn.o_proj,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(MODELS))
def test_layer_output_is_the_share_behind_the_projection(name, kind):
    make, projection = MODELS[name]
    model = make()
    with torch.no_grad():  # they are no part of what a head changes
        for module in model.modules():
            if getattr(module, "bias", None) is not None:
                module.bias.normal_()
    made = trial(model, kind, count=1)
    outputs = head_outputs(name, model, made.objective.windows[0])
    found = losses(made, LayerOutput())

    def projected(layer, out):
        with torch.no_grad():
            module = projection(model, layer)
            flat = out.flatten(1).float()[None]
            return (module(flat) - module(torch.zeros_like(flat)))[0].double()

    for layer, unit, candidate in np.ndindex(made.shape):
        own = slice(unit * made.units.size, (unit + 1) * made.units.size)
        dense = outputs[layer][0]
        changed = dense.clone()
        changed[:, own] = outputs[layer][candidate][:, own]
        whole = projected(layer, dense)
        expected = (projected(layer, changed) - whole).square().sum() / whole.square().sum()
        assert found[layer, unit, candidate] == pytest.approx(float(expected), rel=1e-3, abs=1e-8)


def test_layer_output_says_where_it_finds_no_projection():
    made = trial(tiny("llama"))
    last = made.gated.model.model.layers[1]
    last.self_attn.o_proj, last.mlp = Keyword(last.self_attn.o_proj), torch.nn.Identity()
    made.gated.model.lm_head = Keyword(made.gated.model.lm_head)
    with pytest.raises(ValueError, match="that of 1 of 2 layers was not found; use score='gate_gradient'"):
        LayerOutput().gains(made, made.dense)


class Keyword(torch.nn.Module):
    """A projection that hands its input on by name."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(input=x)


@pytest.mark.parametrize(
    "score", [HeadOutput(), LayerOutput(), AttentionMass()], ids=lambda score: score.name
)
def test_heads_that_give_nothing_lose_nothing(score):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.zero_()
    lost = losses(trial(model), score)
    assert np.isfinite(lost).all()
    if score != AttentionMass():
        assert (lost[1] == 0).all()
    assert (lost[0, :, 1] > 0).all()
