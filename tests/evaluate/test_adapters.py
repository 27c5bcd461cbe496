"""Runs of a PeftModel: with its adapter, without, and the dense control."""

import argparse
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

import hf_sparse
from hf_sparse.evaluate import adapter_gaps, perplexity, table

SOURCE = Path(argparse.__file__).read_text(encoding="utf-8")
TEXTS = [SOURCE[i * 900 : i * 900 + 600] for i in range(6)]
WINDOW = hf_sparse.SlidingWindow(window=8)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of libraries, about each other


def adapted(model, seed, modules_to_save=None):
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        modules_to_save=modules_to_save,
    )
    return get_peft_model(model, config)


def run_by_title(result):
    return {run.title: run for run in result.runs}


def test_runs_with_and_without_the_adapter(tiny_model, tiny_tokenizer):
    plain = perplexity(tiny_model, tiny_tokenizer, TEXTS, max_length=100, patterns=[WINDOW])
    model = adapted(tiny_model, 1, modules_to_save=["norm"])
    with torch.no_grad():
        model.base_model.model.model.norm.modules_to_save.default.weight.mul_(1.5)
    result = perplexity(
        model, tiny_tokenizer, TEXTS, max_length=100, patterns=[WINDOW], without_adapter=True, head_chunk=11
    )
    assert [run.title for run in result.runs] == [
        "dense",
        "sliding_window(window=8)",
        "dense + adapter",
        "sliding_window(window=8) + adapter",
    ]
    for run, without in zip(result.runs[:2], plain.runs, strict=True):
        assert run.nats == pytest.approx(without.nats, rel=1e-5)
    merged = model.merge_and_unload()
    expected = perplexity(merged, tiny_tokenizer, TEXTS, max_length=100, patterns=[WINDOW])
    for run, same in zip(result.runs[2:], expected.runs, strict=True):
        assert run.nats == pytest.approx(same.nats, rel=1e-5)
        assert abs(run.nats - plain.runs[0].nats).min() > 1e-3


def test_the_control_is_run_densely_and_the_gap_uses_it(tiny_model, tiny_tokenizer):
    model = adapted(tiny_model, 1)
    torch.manual_seed(2)
    model.add_adapter("other", model.peft_config["default"])
    result = perplexity(
        model,
        tiny_tokenizer,
        TEXTS,
        max_length=100,
        patterns=[WINDOW],
        without_adapter=True,
        control="other",
    )
    assert model.active_adapter == "default"
    runs = run_by_title(result)
    model.set_adapter("other")
    alone = perplexity(model, tiny_tokenizer, TEXTS, max_length=100)
    assert runs["dense + control"].nats == pytest.approx(alone.runs[0].nats, rel=1e-6)
    ((label, gap),) = adapter_gaps(result)
    assert label == str(WINDOW)
    name = str(WINDOW)
    expected = result.nats_per_token(runs[f"{name} + adapter"]) - result.nats_per_token(
        runs["dense + control"]
    )
    assert gap.residual.estimate == pytest.approx(expected)
    assert "above the dense control" in table(result)


@pytest.mark.parametrize("trained", [False, True])
def test_which_weights_are_trained_stays_as_it_was(tiny_model, tiny_tokenizer, trained):
    model = adapted(tiny_model, 1, modules_to_save=["norm"])
    model.add_adapter("other", model.peft_config["default"])
    if not trained:  # as after loading for inference
        model.requires_grad_(False)
    before = {name: weight.requires_grad for name, weight in model.named_parameters()}
    perplexity(model, tiny_tokenizer, TEXTS[:1], max_length=50, without_adapter=True, control="other")
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == before


def test_adapters_that_change_the_input_are_refused(tiny_model, tiny_tokenizer):
    model = get_peft_model(tiny_model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        perplexity(model, tiny_tokenizer, TEXTS[:1], max_length=50)
