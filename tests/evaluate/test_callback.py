"""Perplexity during training: what is logged, what it decides, and that the training does not notice."""

import argparse
import copy
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import hf_sparse
from hf_sparse.evaluate import perplexity
from hf_sparse.evaluate.callback import PerplexityCallback
from hf_sparse.hf import settings

SOURCE = Path(argparse.__file__).read_text(encoding="utf-8")
TEXTS = [SOURCE[i * 700 : i * 700 + 300 + 90 * i] for i in range(3)]
WINDOW = hf_sparse.SlidingWindow(window=8)
LENGTH = 48

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of libraries, about each other


class Losses(TrainerCallback):
    """Keeps what reporting callbacks are given."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append({**logs, "step": state.global_step})


@pytest.fixture
def make_trainer(tiny_model, tiny_tokenizer, tmp_path):
    def make(model=None, callbacks=(), **changes):
        ids = tiny_tokenizer(SOURCE[:4000], add_special_tokens=False)["input_ids"]
        samples = [ids[i : i + LENGTH] for i in range(0, 8 * LENGTH, LENGTH)]
        data = Dataset.from_dict({"input_ids": samples, "labels": samples})
        arguments = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "disable_tqdm": True,
            "use_cpu": True,
            "report_to": "none",
            "seed": 1,
            **changes,
        }
        return Trainer(
            model=tiny_model if model is None else model,
            args=TrainingArguments(**arguments),
            train_dataset=data,
            eval_dataset=data.select(range(2)),
            processing_class=tiny_tokenizer,
            callbacks=list(callbacks),
        )

    return make


def adapted(model, dropout=0.0):
    torch.manual_seed(0)
    config = LoraConfig(
        r=2, target_modules=["q_proj"], lora_dropout=dropout, task_type="CAUSAL_LM", init_lora_weights=False
    )
    return get_peft_model(model, config)


def logged(trainer, key):
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


def test_figures_are_those_of_perplexity_and_reach_every_reader(make_trainer, tiny_model, tiny_tokenizer):
    hf_sparse.patch_model(tiny_model, WINDOW, layers=[1])
    reported = Losses()
    trainer = make_trainer(callbacks=[reported])
    trainer.add_callback(PerplexityCallback(trainer, TEXTS, max_length=60, batch_size=2))
    trainer.train()
    assert settings(tiny_model).pattern == WINDOW and settings(tiny_model).layers == (1,)
    sparse = logged(trainer, "eval_sparse_perplexity")
    assert list(sparse) == [2, 4] and sparse[2] != sparse[4]
    assert [e["step"] for e in reported.seen if "eval_sparse_perplexity" in e] == [2, 4]
    result = perplexity(
        tiny_model, tiny_tokenizer, TEXTS, max_length=60, patterns=[settings(tiny_model)], batch_size=2
    )
    dense, own = result.runs
    last = trainer.state.log_history[-2]  # before the summary of the training
    assert last["eval_dense_perplexity"] == pytest.approx(result.perplexity(dense), rel=1e-6)
    assert last["eval_sparse_perplexity"] == pytest.approx(result.perplexity(own), rel=1e-6)
    assert last["eval_sparse_nats_above_dense"] == pytest.approx(
        math.log(last["eval_sparse_perplexity"] / last["eval_dense_perplexity"]), abs=1e-9
    )
    assert last["eval_sparse_density"] == own.density < 1
    assert trainer.evaluate()["eval_dense_perplexity"] == pytest.approx(result.perplexity(dense), rel=1e-6)


def test_what_the_model_cannot_read_is_said_before_the_training(make_trainer, tiny_tokenizer):
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=4, n_positions=64))
    trainer = make_trainer(gpt2)
    with pytest.raises(ValueError, match=r"max_length=65 is beyond the 64 positions"):
        PerplexityCallback(trainer, TEXTS, max_length=65)
    with pytest.raises(ValueError, match=r"no document reaches the 60 tokens"):
        PerplexityCallback(trainer, [TEXTS[0][:40]], max_length=60, contexts=(60,), context_targets=8)
    with pytest.raises(ValueError, match=r"mask_share=0.5 is for encoders"):
        PerplexityCallback(trainer, TEXTS, max_length=60, mask_share=0.5)


@pytest.mark.parametrize("every", [None, 1])
def test_the_training_is_bit_identical_with_and_without_it(make_trainer, tiny_model, every):
    hf_sparse.patch_model(tiny_model, WINDOW)
    start = {name: weight.clone() for name, weight in tiny_model.state_dict().items()}
    ends, losses, modes = [], [], []
    for measured in (False, True):
        tiny_model.load_state_dict(start)
        model = adapted(tiny_model, dropout=0.5)  # draws random numbers in every step
        trainer = make_trainer(model)
        if measured:
            trainer.add_callback(
                PerplexityCallback(trainer, TEXTS, max_length=60, every=every, without_adapter=True)
            )
        trainer.train()
        ends.append({name: weight.clone() for name, weight in model.state_dict().items()})
        losses.append(logged(trainer, "loss"))
        modes.append([module.training for module in model.modules()])
        model.unload()
    assert len(logged(trainer, "eval_sparse_perplexity")) == (2 if every is None else 4)
    assert list(losses[0]) == [1, 2, 3, 4] and losses[0] == losses[1]
    assert modes[0] == modes[1]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert any(not torch.equal(ends[0][name], start.get(name, torch.zeros(0))) for name in ends[0])


def test_an_adapter_is_measured_with_and_without(make_trainer, tiny_model, tiny_tokenizer):
    hf_sparse.patch_model(tiny_model, WINDOW)
    plain = perplexity(tiny_model, tiny_tokenizer, TEXTS, max_length=60, patterns=[WINDOW])
    trainer = make_trainer(adapted(tiny_model), max_steps=2)
    trainer.add_callback(PerplexityCallback(trainer, TEXTS, max_length=60, without_adapter=True))
    trainer.train()
    last = trainer.state.log_history[-2]
    for run, name in zip(plain.runs, ("dense", "sparse"), strict=True):
        assert last[f"eval_base_{name}_perplexity"] == pytest.approx(plain.perplexity(run), rel=1e-6)
        assert abs(last[f"eval_{name}_nats_per_token"] - plain.nats_per_token(run)) > 1e-3


def test_the_best_model_is_the_one_with_the_lowest_sparse_perplexity(make_trainer, tiny_model):
    hf_sparse.patch_model(tiny_model, WINDOW)
    best = {"metric_for_best_model": "eval_sparse_perplexity", "greater_is_better": False}
    saved = {"save_strategy": "steps", "save_steps": 1, "eval_steps": 1, "load_best_model_at_end": True}
    trainer = make_trainer(learning_rate=0.3, max_steps=6, **best, **saved)
    trainer.add_callback(PerplexityCallback(trainer, TEXTS, max_length=60))
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    found = logged(trainer, "eval_sparse_perplexity")
    step = min(found, key=found.get)
    assert len(found) == min(6, step + 2) and step < 6, "at this learning rate some step is worse"
    assert trainer.state.best_metric == found[step] and trainer.state.best_global_step == step
    assert trainer.evaluate()["eval_sparse_perplexity"] == pytest.approx(found[step], rel=1e-6)


def test_several_evaluation_sets_and_steps_measure_the_same_weights_once(make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=2)
    trainer.eval_dataset = {"a": trainer.eval_dataset, "b": trainer.eval_dataset}
    calls = []
    monkeypatch.setattr(
        "hf_sparse.evaluate.callback.perplexity", lambda *a, **k: calls.append(1) or perplexity(*a, **k)
    )
    trainer.add_callback(PerplexityCallback(trainer, TEXTS, max_length=60, every=2))
    trainer.train()
    assert (len(calls), list(logged(trainer, "eval_dense_perplexity"))) == (1, [2])
    assert "eval_sparse_perplexity" not in trainer.state.log_history[-2]
    trainer.evaluate()
    assert len(calls) == 3, "after the training the weights may have changed"


def test_trained_projections_of_global_queries_are_measured_and_kept(tiny_tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForMaskedLM(BertConfig(vocab_size=400, initializer_range=0.3, **sizes))
    hf_sparse.patch_model(model, "longformer", window=8, global_projections=True)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.mask_token = "<pad>"

    def nats():
        runs = perplexity(model, tokenizer, TEXTS[:1], max_length=40, patterns=[settings(model)]).runs
        return [run.nats[0] for run in runs]

    before = nats()
    trained = [weight for name, weight in model.named_parameters() if "_global" in name]
    with torch.no_grad():
        for weight in trained:
            weight.mul_(-3)
    after = nats()
    assert after[0] == before[0] and abs(after[1] - before[1]) > 1e-3
    kept = [weight for name, weight in model.named_parameters() if "_global" in name]
    assert len(kept) == 12 and all(a is b for a, b in zip(kept, trained, strict=True))


def test_wrong_arguments_are_refused_before_the_training(make_trainer):
    trainer = make_trainer()

    def refused(message, documents=TEXTS, **changes):
        with pytest.raises(ValueError, match=message):
            PerplexityCallback(trainer, documents, **{"max_length": 60, **changes})

    refused("there are no documents to evaluate", documents=[])
    refused("none of the 1 documents has 2 tokens to score", documents=["a"])
    refused("every must be a whole number of steps >= 1, got 0", every=0)
    refused("only a PeftModel has adapters", without_adapter=True)
    refused("unknown mode 'fast'", mode="fast")
    refused("max_length must be a whole number >= 3", max_length=2)
    with pytest.raises(TypeError, match="stides"):
        PerplexityCallback(trainer, TEXTS, max_length=60, stides=4)
    trainer.is_fsdp_enabled = True
    refused("FSDP and DeepSpeed spread the weights")
    trainer.is_fsdp_enabled, trainer.processing_class = False, None
    refused(r"Trainer\(processing_class=tokenizer\)")
    idle = make_trainer(eval_strategy="no")
    idle.add_callback(PerplexityCallback(idle, TEXTS, max_length=60))
    with pytest.raises(ValueError, match="no perplexity would be measured: the Trainer never evaluates"):
        idle.train()
