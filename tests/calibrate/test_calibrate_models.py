"""Calibration of every kind of model, in low precision, checkpointed, with an adapter, read from a folder."""

import functools

import numpy as np
import pytest
import torch
from tiny_models import random_model, tiny
from torch.utils.checkpoint import checkpoint

from hf_sparse import BlockLocal, SlidingWindow, StreamingLLM, calibrate, patch_model
from hf_sparse.calibrate.checkpointing import checkpointed
from hf_sparse.documents import Document
from hf_sparse.evaluate.variants import measured_in_eval_mode

from .trials import random_choice, trial
from .writers import LENGTH, texts, tokenizer, writer

CANDIDATES = (SlidingWindow(3), StreamingLLM(sinks=1, window=5), BlockLocal(6))


@functools.cache
def encoder_tokenizer():
    made = type(tokenizer())(tokenizer_object=tokenizer().backend_tokenizer)
    made.cls_token, made.sep_token, made.mask_token = "w2", "w3", "w1"
    return made


def calibrated(model, **options):
    settings = {"candidates": CANDIDATES, "budget": 0.6, "tokenizer": tokenizer(), "length": 29, "samples": 2}
    return calibrate(model, texts(), **{**settings, "stages": 2, "beyond": 1, **options})


@pytest.mark.parametrize("unit", ["head", "layer"])
@pytest.mark.parametrize(
    "name", ["qwen3", "mistral", "gemma2", "gpt2", "gpt_neox", "bert", "roberta", "modernbert"]
)
def test_every_kind_of_model_is_calibrated(name, unit):
    model = tiny(name)
    is_encoder = name in ("bert", "roberta", "modernbert")
    result = calibrated(
        model,
        unit=unit,
        objective="kl",
        budget=0.85,
        tokenizer=encoder_tokenizer() if is_encoder else tokenizer(),
    )
    assert result.dense.value == pytest.approx(0, abs=1e-6) and result.cheapest.value > 0.01
    assert result.cheapest.cost <= result.chosen.cost <= 0.85
    assert np.isfinite(result.gains).all()
    values = [point.value for point in result.frontier]
    assert values[-1] == min(values)
    patch_model(model, result.pattern)


def test_low_precision_chooses_nearly_the_same():
    exact, coarse = calibrated(writer()), calibrated(writer().bfloat16())
    assert coarse.config["dtype"] == "bfloat16"
    assert coarse.chosen.value == pytest.approx(exact.chosen.value, rel=0.02)
    assert np.corrcoef(coarse.gains.ravel(), exact.gains.ravel())[0, 1] > 0.99


def test_an_adapter_is_calibrated_with_its_model():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted, base = get_peft_model(writer(), config), calibrated(writer())
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    result = calibrated(adapted)
    assert trained == {name for name, weight in adapted.named_parameters() if weight.requires_grad} != set()
    assert abs(result.dense.value - base.dense.value) > 1e-3
    merged = calibrated(adapted.merge_and_unload())
    np.testing.assert_allclose(result.gains, merged.gains, atol=1e-3 * np.abs(merged.gains).max())


def test_figures_of_another_adapter_are_not_taken(tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(writer(), config).eval()
    adapted.add_adapter("other", config)
    options = {"output": tmp_path, "score": "layer_output"}
    calibrated(adapted, **options)
    adapted.set_adapter("other")
    with pytest.raises(ValueError, match=r'holds other figures \(adapter: "default", now "other"\)'):
        calibrated(adapted, **options)


def test_a_model_that_is_patched_is_calibrated_from_dense():
    plain, patched = calibrated(writer()), calibrated(patch_model(writer(), "sliding_window", window=2))
    assert plain.chosen.choice.tolist() == patched.chosen.choice.tolist()
    np.testing.assert_array_equal(plain.dense.values, patched.dense.values)


def test_the_tokenizer_of_a_saved_model_is_found(tmp_path):
    from transformers import AutoModelForCausalLM

    writer().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = calibrated(model, tokenizer=None)
    assert found.chosen.choice.tolist() == calibrated(writer()).chosen.choice.tolist()
    with pytest.raises(
        ValueError, match=r"was not loaded from anywhere, so its tokenizer is unknown; pass tokenizer="
    ):
        calibrated(writer(), tokenizer=None)


def test_texts_may_be_a_generator_or_documents():
    def dense(given):
        result = calibrate(
            writer(),
            given,
            [SlidingWindow(3)],
            tokenizer=tokenizer(),
            length=LENGTH,
            samples=3,
            score="layer_output",
        )
        return result.dense.values.tolist()

    expected = dense(texts())
    assert dense(text for text in texts()) == dense([Document("a", text) for text in texts()]) == expected


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gemma3"])
def test_checkpointing_changes_no_gradient(name):
    found, runs = [], []
    for wanted in (False, True):
        model = tiny(name).requires_grad_(False)
        made = trial(model, count=1)
        layers = {module for module in model.modules() if hasattr(module, "gradient_checkpointing")}
        ran = []
        for layer in layers:
            attention = next(child for child in layer.children())
            attention.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        gates = made.one_hot(random_choice(made))
        with measured_in_eval_mode(model):
            if wanted:
                with checkpointed(model):
                    found.append(made.gradient(gates))
            else:
                found.append(made.gradient(gates))
        runs.append(len(ran))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-7)
    assert runs[1] > runs[0], "layers are computed again"
    assert np.abs(found[0]).max() > 0


def test_checkpointing_leaves_no_trace():
    model = writer().train()
    model.gradient_checkpointing_enable = None  # transformers' own switch is not touched
    layers = list(model.model.layers)
    mine = functools.partial(checkpoint, use_reentrant=True)
    layers[0].gradient_checkpointing, layers[0]._gradient_checkpointing_func = True, mine
    before = [dict(vars(layer)) for layer in layers]
    plain, again = calibrated(writer()), calibrated(model, checkpointing=True)
    np.testing.assert_allclose(plain.gains, again.gains, atol=1e-5)
    assert [dict(vars(layer)) for layer in layers] == before


def test_checkpointing_is_refused_where_it_would_change_the_figures():
    model = tiny("opt")
    for layer in model.model.decoder.layers:
        layer.dropout = 0.1
    with pytest.raises(
        ValueError, match="OPTForCausalLM drop out activations while they are checkpointed; set its"
    ):
        calibrated(model, checkpointing=True)
    model = random_model("GPTNeoXForCausalLM", {**tiny("gpt_neox").config.to_dict(), "num_hidden_layers": 1})
    model.gpt_neox.layers = torch.nn.ModuleList()
    with (
        pytest.raises(ValueError, match="has no gradient checkpointing; use checkpointing=False"),
        checkpointed(model),
    ):
        pass


def test_one_window_of_a_layer_with_one_head():
    options = {"vocab_size": 64, "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 64, "bos_token_id": 2}
    model = random_model("GPT2LMHeadModel", {**options, "eos_token_id": None})
    result = calibrated(model, samples=1, candidates=[SlidingWindow(1)], budget=1.0, length=7, objective="kl")
    assert result.gains.shape == (1, 1, 2) and result.frontier[-1].cost == 1
    assert result.cheapest.cost == pytest.approx(7 / 28), "with a window of 1 a query sees itself alone"


def test_candidates_that_cost_the_same_do_not_stop_it():
    same = (
        SlidingWindow(4),
        StreamingLLM(sinks=1, window=3),
        SlidingWindow(4) | StreamingLLM(sinks=1, window=3),
    )
    for rescore in (True, "unit"):
        result = calibrated(tiny("llama"), candidates=same, rescore=rescore, objective="kl")
        assert result.costs.shares[0, 0, 1] == result.costs.shares[0, 0, 2]
        assert result.chosen.cost <= 0.6


def test_windows_wider_than_the_models_own_are_left_at_dense():
    result = calibrated(
        tiny("gemma3"), candidates=[SlidingWindow(3), SlidingWindow(12)], rescore="unit", objective="kl"
    )
    assert (result.costs.shares[0, :, 0] == result.costs.shares[0, :, 2]).all(), (
        "layer 0 sees 9 keys in any case"
    )
    assert all((point.choice[0] != 2).all() for point in result.frontier)
