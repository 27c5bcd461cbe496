"""Gradients, gradient checkpointing, dropout and LoRA on patched models."""

import copy
import warnings

import pytest
import torch
from tiny_models import ALL, DECODERS, logits, native_constraint, tiny, tokens

import hf_sparse
from hf_sparse import SlidingWindow, StreamingLLM

# peft still asks for the old name of what transformers now calls activation checkpointing
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def _gradients(model, ids, **kwargs):
    model.zero_grad(set_to_none=True)
    model(ids, labels=ids, **kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


@pytest.mark.parametrize("name", ALL)
def test_gradients_equal_those_of_eager_attention_under_the_written_mask(name):
    pattern, n = StreamingLLM(sinks=1, window=3), 21
    ids = tokens(2, n)
    kinds = {"full_attention", "sliding_attention"}
    masks = {}
    for kind in kinds:
        constraint = native_constraint(name, kind)
        allowed = pattern.mask(n, causal=constraint.causal)[0]
        if constraint.window is not None:
            allowed &= (torch.arange(n)[:, None] - torch.arange(n)).abs() < constraint.window
        masks[kind] = (
            torch.zeros(n, n).masked_fill(~allowed, torch.finfo(torch.float32).min).expand(2, 1, n, n)
        )
    eager = tiny(name, "eager")
    mixed = len(set(getattr(eager.config, "layer_types", None) or [])) > 1
    extra = {"position_ids": torch.arange(n)[None]} if name == "opt" else {}
    expected = _gradients(eager, ids, attention_mask=masks if mixed else masks["full_attention"], **extra)
    got = _gradients(hf_sparse.patch_model(tiny(name), pattern), ids)
    assert got.keys() == expected.keys()
    for key, gradient in got.items():
        torch.testing.assert_close(
            gradient, expected[key], atol=2e-5, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant):
    model = _without_dropout(hf_sparse.patch_model(tiny(name), "sliding_window", window=3)).train()
    ids = tokens(2, 18)
    extra = {"attention_mask": torch.tensor([[0] * 4 + [1] * 14, [1] * 18])}
    plain = _gradients(model, ids, **extra)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpointed = _gradients(model, ids, **extra)
    assert plain.keys() == checkpointed.keys()
    for key in plain:
        torch.testing.assert_close(checkpointed[key], plain[key], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "modernbert"])
def test_packed_samples_are_kept_apart_when_checkpointing_recomputes(name):
    model = _without_dropout(hf_sparse.patch_model(tiny(name), "sliding_window", window=6)).train()
    ids = tokens(1, 20)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    plain = _gradients(model, ids, position_ids=positions)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = _gradients(model, ids, position_ids=positions)
    for key in plain:
        torch.testing.assert_close(checkpointed[key], plain[key], atol=1e-6, rtol=1e-5)


def test_recomputing_under_another_attention_raises():
    ids = tokens(1, 12)
    model = tiny("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(ids, labels=ids).loss
    hf_sparse.patch_model(model, "sliding_window", window=3)
    with pytest.raises(ValueError, match="recomputes this layer under another attention"):
        loss.backward()


@pytest.mark.parametrize("name", ["gpt2", "bert", "roberta"])
def test_attention_dropout_is_seeded_and_only_in_training(name):
    model = hf_sparse.patch_model(tiny(name), "sliding_window", window=4)
    for module in model.modules():  # leave attention dropout alone: 0.1 by default in these models
        if isinstance(module, torch.nn.Dropout) and "attn_dropout" not in repr(module):
            module.p = 0.1
    ids = tokens(2, 16)
    assert torch.equal(logits(model, ids), logits(model, ids))
    model.train()
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(_gradients(model, ids))
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
    assert any(not torch.equal(runs[0][key], runs[2][key]) for key in runs[0])


def test_dropout_of_attention_alone_changes_the_logits_in_training():
    model = _without_dropout(hf_sparse.patch_model(tiny("gpt2"), "sliding_window", window=4)).train()
    ids = tokens(1, 16)
    expected = logits(model, ids)
    for block in model.transformer.h:
        block.attn.attn_dropout.p = 0.5
    assert not torch.equal(logits(model, ids), expected)
    model.eval()
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("name", DECODERS)
def test_lora_trains_merges_and_steps_aside(name):
    from peft import LoraConfig, get_peft_model

    pattern = SlidingWindow(window=4)
    base = hf_sparse.patch_model(tiny(name), pattern)
    ids = tokens(2, 16)
    before = logits(base, ids)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft remarks on Conv1D layers
        model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert torch.equal(logits(model, ids), before)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    model.eval()
    adapted = logits(model, ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), before)
    hf_sparse.unpatch_model(model)
    assert not torch.allclose(logits(model, ids), adapted)
    hf_sparse.patch_model(model, pattern)
    assert torch.equal(logits(model, ids), adapted)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), adapted, atol=1e-4, rtol=1e-3)
