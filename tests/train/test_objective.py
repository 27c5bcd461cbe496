"""The distillation loss against its formula written out, with gradients; the teacher against the unpatched model."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, kl_div
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import hf_sparse
from hf_sparse.hf.computed import computed_by
from hf_sparse.hf.global_projections import NAMES
from hf_sparse.train.config.objective import ObjectiveArguments
from hf_sparse.train.lora import attention_targets, embedding_names, norm_names
from hf_sparse.train.objective import Objective
from hf_sparse.train.student import StudentAttention

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=16)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
        )
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**SMALL)),
}


def adapted_model(name, pattern, *, embeddings=False, projections=False, dropout=0.0):
    """Return a patched PeftModel whose LoRA and norms have moved away from where they begin."""
    torch.manual_seed(0)
    model = MODELS[name]()
    model.config.use_cache = False
    hf_sparse.patch_model(model, pattern)
    full = norm_names(model) + (embedding_names(model) if embeddings else [])
    full += NAMES if projections else ()
    config = LoraConfig(
        r=2,
        lora_dropout=dropout,
        target_modules=attention_targets(model),
        modules_to_save=full,
        fan_in_fan_out=name == "gpt2",
        ensure_weight_tying=embeddings and name == "llama-tied",
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return adapted.train()


def batch_of(name, rows=2, length=23):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 61, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, 0] = -100
    labels[0, 5:9] = -100
    if name == "bert":
        labels[torch.rand(labels.shape, generator=generator) < 0.7] = -100
    return {"input_ids": ids, "labels": labels}


def written_out(adapted, pattern, batch, weights, masked):
    """Return the loss with all logits at once; the teacher is the unpatched base without the adapter."""
    base = adapted.get_base_model()
    ids, labels = batch["input_ids"], batch["labels"]
    with torch.no_grad(), adapted.disable_adapter():
        adapted.eval()
        hf_sparse.unpatch_model(base)
        dense = adapted(input_ids=ids).logits
        hf_sparse.patch_model(base, pattern)
        adapted.train()
    sparse = adapted(input_ids=ids).logits
    if not masked:
        dense, sparse, labels = dense[:, :-1], sparse[:, :-1], labels[:, 1:]
    chosen = labels != -100
    dense, sparse, labels = dense[chosen], sparse[chosen], labels[chosen]
    kl = kl_div(sparse.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="batchmean")
    return weights[0] * kl + weights[1] * cross_entropy(sparse, labels)


def gradients(adapted, loss):
    adapted.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}


def checkpoint_layers(adapted, reentrant):
    base = adapted.get_base_model()
    # as transformers calls it, by version
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    base.enable_input_require_grads()


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, 0.3)], ids=["kl", "lm", "both"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_formula(name, weights):
    pattern = hf_sparse.SlidingWindow(5)
    adapted = adapted_model(name, pattern, embeddings=name == "llama-tied", dropout=0.0)
    for module in adapted.modules():  # BERT and GPT-2 drop out of themselves
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    adapted.get_base_model().config.attention_probs_dropout_prob = 0.0
    for module in adapted.modules():
        for name_of_rate in ("attention_dropout", "attn_dropout"):
            if isinstance(getattr(module, name_of_rate, None), float):
                setattr(module, name_of_rate, 0.0)
    batch = batch_of(name)
    settings = ObjectiveArguments(kl_weight=weights[0], lm_weight=weights[1], head_chunk=7)
    objective = Objective(adapted, settings, StudentAttention(adapted))
    want = written_out(adapted, pattern, batch, weights, name == "bert")
    wanted = gradients(adapted, want)
    got = objective(adapted, batch)
    given = gradients(adapted, got.total)
    torch.testing.assert_close(got.total, want.detach(), rtol=1e-5, atol=1e-6)
    assert wanted.keys() == given.keys()
    assert (name == "llama-tied") == any("embed_tokens" in key for key in given)
    for key in wanted:
        # the sums of gradients over 23 tokens in another order
        torch.testing.assert_close(
            given[key], wanted[key], rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )
    total = sum(getattr(settings, f"{part}_weight") * value for part, value in got.parts.items())
    torch.testing.assert_close(total, want.detach(), rtol=1e-5, atol=1e-6)


def test_the_teacher_is_the_dense_base_without_dropout_and_leaves_the_model_in_training():
    adapted = adapted_model("llama", hf_sparse.SlidingWindow(3), dropout=0.5)
    objective = Objective(adapted, ObjectiveArguments(), StudentAttention(adapted))
    batch = batch_of("llama")
    inputs = {"input_ids": batch["input_ids"]}
    states, outputs = objective.teacher.read(inputs, keep_attention=True)
    assert adapted.training and [tuple(out.shape) for out in outputs] == [(2, 4, 23, 8)] * 2
    given = objective.teacher.logits(states, states.hidden)
    base = hf_sparse.unpatch_model(adapted.get_base_model())
    with torch.no_grad(), adapted.disable_adapter():
        want = adapted.eval()(input_ids=batch["input_ids"]).logits
    torch.testing.assert_close(given, want, rtol=1e-5, atol=1e-5)
    assert not given.requires_grad and base is adapted.get_base_model()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_outputs_are_pulled_to_the_teachers(checkpointing):
    adapted = adapted_model("llama", hf_sparse.SlidingWindow(3))
    if checkpointing:
        checkpoint_layers(adapted, reentrant=False)
    settings = ObjectiveArguments(kl_weight=0.0, attention_weight=2.0)
    student = StudentAttention(adapted)
    objective = Objective(adapted, settings, student)
    batch = batch_of("llama")
    got = objective(adapted, batch)
    _, wanted = objective.teacher.read({"input_ids": batch["input_ids"]}, keep_attention=True)
    with student.keeping(True) as given:
        adapted(input_ids=batch["input_ids"])
    shares = [(a - b).square().mean() / b.square().mean() for a, b in zip(given, wanted, strict=True)]
    torch.testing.assert_close(got.total, 2 * torch.stack(shares).mean(), rtol=1e-5, atol=1e-6)
    assert got.parts.keys() == {"attention"}
    moved = gradients(adapted, got.total)
    straight = gradients(adapted, 2 * torch.stack(shares).mean())
    # the output projection of the last layer comes after what is compared
    assert {key for key in moved if "layers.1.self_attn.q_proj.lora_" in key}
    for key, gradient in moved.items():
        if key in straight:
            torch.testing.assert_close(gradient, straight[key], rtol=1e-4, atol=1e-6)


def test_rows_with_projections_of_their_own_are_pulled_as_they_are_given():
    adapted = adapted_model(
        "bert", hf_sparse.Longformer(window=3, global_tokens=(0,), global_projections=True), projections=True
    )
    settings = ObjectiveArguments(kl_weight=0.0, attention_weight=1.0)
    objective = Objective(adapted, settings, StudentAttention(adapted))
    moved = gradients(adapted, objective(adapted, batch_of("bert")).total)
    assert all(any(name in key and moved[key].abs().max() > 0 for key in moved) for name in NAMES)


def test_reentrant_checkpointing_gives_attention_no_gradient_and_is_refused():
    adapted = adapted_model("llama", hf_sparse.SlidingWindow(3))
    checkpoint_layers(adapted, reentrant=True)
    objective = Objective(
        adapted, ObjectiveArguments(kl_weight=0.0, attention_weight=1.0), StudentAttention(adapted)
    )
    with pytest.raises(ValueError, match=r"attention_weight needs .*use_reentrant: false"):
        objective(adapted, batch_of("llama"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_computed_again_under_the_same_window(reentrant):
    pattern, batch = hf_sparse.SlidingWindow(3), batch_of("llama")
    adapted = adapted_model("llama", pattern)
    student = StudentAttention(adapted)
    objective = Objective(adapted, ObjectiveArguments(), student)
    with student.widened(11):
        want = gradients(adapted, objective(adapted, batch).total)
    checkpoint_layers(adapted, reentrant)
    with student.widened(11):
        got = gradients(adapted, objective(adapted, batch).total)
    wide = hf_sparse.patch_model(adapted.get_base_model(), pattern | hf_sparse.SlidingWindow(11))
    direct = gradients(adapted, objective(adapted, batch).total)
    narrow = hf_sparse.patch_model(wide, pattern)
    alone = gradients(adapted, objective(adapted, batch).total)
    assert narrow is wide
    key = next(key for key in want if "layers.0.self_attn.v_proj.lora_B" in key)
    assert not torch.allclose(alone[key], direct[key], rtol=1e-2)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(got[name], direct[name], rtol=1e-5, atol=1e-7)


def test_padding_and_accumulated_batches_count_by_their_tokens():
    adapted = adapted_model("llama", hf_sparse.SlidingWindow(5))
    objective = Objective(
        adapted, ObjectiveArguments(kl_weight=0.6, lm_weight=0.4), StudentAttention(adapted)
    )
    whole = batch_of("llama", rows=3)
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    whole["attention_mask"][1, 15:] = 0
    whole["labels"][1, 15:] = -100
    want = gradients(adapted, objective(adapted, whole).total)
    count = (whole["labels"][:, 1:] != -100).sum()
    adapted.zero_grad()
    parts = []
    for row in range(3):
        stop = 15 if row == 1 else 23  # alone, the second row needs no padding
        part = {name: tensor[row : row + 1, :stop] for name, tensor in whole.items()}
        loss = objective(adapted, part, count)
        loss.total.backward()
        parts.append(loss.total.detach())
    torch.testing.assert_close(sum(parts), objective(adapted, whole).total.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in adapted.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-6)


def test_logits_are_held_a_chunk_at_a_time(monkeypatch):
    adapted = adapted_model("llama", hf_sparse.SlidingWindow(5))
    objective = Objective(adapted, ObjectiveArguments(lm_weight=1.0, head_chunk=8), StudentAttention(adapted))
    rows = []
    plain = objective.head.logits
    monkeypatch.setattr(
        objective.head,
        "logits",
        lambda states, hidden: rows.append(hidden.shape[0] * hidden.shape[1]) or plain(states, hidden),
    )
    objective(adapted, batch_of("llama"))
    assert max(rows) == 8 and sum(rows) == 2 * 2 * 23  # two rows of four positions; teacher and student


def test_what_computes_attention_is_put_back_when_blocks_are_nested():
    adapted = adapted_model("llama", hf_sparse.SlidingWindow(5))
    ids, seen = batch_of("llama")["input_ids"], []

    def noted(label):
        def compute(asked):
            seen.append(label)
            return asked.query.new_zeros(asked.query.shape)

        return compute

    with torch.no_grad(), computed_by(adapted, noted("outer")):
        with computed_by(adapted, noted("inner")):
            adapted(input_ids=ids)
        adapted(input_ids=ids)
    adapted(input_ids=ids)
    assert seen == ["inner"] * 2 + ["outer"] * 2


def test_learned_positions_that_the_pattern_moves_have_no_dense_teacher():
    adapted = adapted_model("gpt2", hf_sparse.StreamingLLM(sinks=2, window=6, positions="cache"))
    with pytest.raises(ValueError, match="cannot be its own dense teacher; set kl_weight=0"):
        Objective(adapted, ObjectiveArguments(), StudentAttention(adapted))
    alone = Objective(adapted, ObjectiveArguments(kl_weight=0.0, lm_weight=1.0), StudentAttention(adapted))
    assert alone(adapted, batch_of("gpt2")).total.isfinite()
