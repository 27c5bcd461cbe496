"""Separate projections of global queries: added, trained, saved, loaded and taken away again."""

import copy

import pytest
import torch
import transformers
from tiny_models import logits, tiny, tokens

import hf_sparse
from hf_sparse import Full, Longformer, SlidingWindow
from hf_sparse.hf import settings
from hf_sparse.patterns.algebra import PerHead, PerLayer
from hf_sparse.patterns.layered import Layered

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

NAMES = ["query_global", "key_global", "value_global"]
APART = Longformer(window=3, global_tokens=(0, 5), global_projections=True)
SHARED = Longformer(window=3, global_tokens=(0, 5))


def _added(model):
    return {k: v for k, v in model.state_dict().items() if any(name in k for name in NAMES)}


def _train(model, ids):
    """Two steps on the projections alone."""
    parameters = [
        p for k, p in model.named_parameters() if any(name in k for name in NAMES) and p.requires_grad
    ]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_they_are_copies_at_first_and_trained_on_their_own(name):
    ids = tokens(2, 20)
    model = hf_sparse.patch_model(tiny(name), APART)
    shared = hf_sparse.patch_model(tiny(name), SHARED)
    torch.testing.assert_close(logits(model, ids), logits(shared, ids), atol=1e-5, rtol=1e-4)
    attention = model.base_model.encoder.layer[0].attention.self
    for new, own in zip(NAMES, ("query", "key", "value"), strict=True):
        assert torch.equal(getattr(attention, new).weight, getattr(attention, own).weight)
        assert getattr(attention, new).weight.data_ptr() != getattr(attention, own).weight.data_ptr()
    assert len(_added(model)) == 2 * 3 * 2 and all(p.requires_grad for p in model.parameters())
    before = logits(model, ids)
    _train(model, ids)
    assert (logits(model, ids) - before).abs().max() > 1e-3
    assert not torch.equal(attention.query_global.weight, attention.query.weight)


def test_only_the_rows_of_global_queries_change_in_the_last_layer():
    ids = tokens(1, 20)
    model = hf_sparse.patch_model(tiny("bert"), APART, layers=[1])
    assert all(".layer.1." in key for key in _added(model)) and len(_added(model)) == 6
    before = logits(model, ids)
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.value_global.weight.mul_(2)
    changed = (logits(model, ids) - before).abs().amax(-1)[0] > 1e-6
    assert changed.nonzero().flatten().tolist() == [0, 5]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_asked_nor_seen(side):
    model = _train(
        hf_sparse.patch_model(tiny("bert"), Longformer(3, (0,), global_projections=True)), tokens(2, 9)
    )
    row, chosen = tokens(1, 13), torch.isin(torch.arange(13), 4)[None].long()
    expected = logits(model, row, global_attention_mask=chosen)
    pad = (6, 0) if side == "left" else (0, 6)

    def wide(x, value=0):
        return torch.cat(
            [torch.nn.functional.pad(x, pad, value=value), tokens(1, 19) if value else torch.ones(1, 19)]
        )

    mask = wide(torch.ones(1, 13))
    positions = (mask.cumsum(-1) - 1).clamp(min=0).long()
    chosen = torch.nn.functional.pad(chosen, (*pad, 0, 1))
    got = logits(
        model, wide(row, 1), attention_mask=mask, position_ids=positions, global_attention_mask=chosen
    )
    torch.testing.assert_close(got[0, mask[0] == 1], expected[0], atol=1e-5, rtol=1e-4)


def test_packed_samples_have_their_own_global_rows():
    model = _train(hf_sparse.patch_model(tiny("bert"), APART), tokens(2, 9))
    rows = [tokens(1, length, seed=length) for length in (13, 4, 9)]  # the second has no position 5
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    packed = logits(model, torch.cat(rows, 1), position_ids=positions)
    alone = torch.cat([logits(model, row) for row in rows], 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = hf_sparse.patch_model(tiny("bert"), APART).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids, mask = tokens(2, 18), torch.tensor([[0] * 4 + [1] * 14, [1] * 18])

    def gradients():
        model.zero_grad(set_to_none=True)
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert any("query_global" in key and gradient.abs().max() > 1e-4 for key, gradient in plain.items())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for key in plain:
        torch.testing.assert_close(checkpointed[key], plain[key], atol=1e-6, rtol=1e-5)


def test_attention_dropout_reaches_the_rows_of_global_queries():
    model = hf_sparse.patch_model(tiny("bert"), APART, layers=[1]).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = tokens(1, 18)
    quiet = logits(model, ids)
    model.bert.encoder.layer[1].attention.self.dropout.p = 0.4
    torch.manual_seed(0)
    noisy = logits(model, ids)
    assert (noisy - quiet)[0, [0, 5]].abs().amax(-1).min() > 1e-3
    torch.manual_seed(0)
    assert torch.equal(logits(model, ids), noisy)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_unpatching_removes_them_bit_for_bit(name):
    ids = tokens(1, 20)
    model = _train(hf_sparse.patch_model(tiny(name), APART), ids)
    trained, twin = logits(model, ids), copy.deepcopy(model)
    with hf_sparse.patched(model, SlidingWindow(2)):
        assert not _added(model)
    assert torch.equal(logits(model, ids), trained)
    hf_sparse.patch_model(model, Longformer(4, (0, 5), global_projections=True))
    hf_sparse.patch_model(model, APART)  # another window leaves what was trained
    assert torch.equal(logits(model, ids), trained)
    with pytest.raises(ValueError, match="unknown pattern"):
        hf_sparse.patch_model(model, "nothing")
    hf_sparse.unpatch_model(model)
    assert model.state_dict().keys() == tiny(name).state_dict().keys()
    assert torch.equal(logits(model, ids), logits(tiny(name), ids))
    assert torch.equal(logits(twin, ids), trained)
    for unpatched in (model, hf_sparse.unpatch_model(twin)):
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in unpatched.modules())


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        (APART | SlidingWindow(4), {0, 1}),
        (PerLayer((APART, Full())), {0}),
        (Layered(layers={1: APART}), {1}),
        (PerLayer((SlidingWindow(3), APART | SlidingWindow(4))), {1}),
    ],
    ids=str,
)
def test_a_composed_pattern_has_them_in_its_own_layers(pattern, layers):
    ids = tokens(1, 20)
    model = hf_sparse.patch_model(tiny("bert"), pattern)
    assert {int(key.split(".layer.")[1][0]) for key in _added(model)} == layers
    before = logits(model, ids)
    _train(model, ids)
    assert (logits(model, ids) - before).abs().max() > 1e-3


def _refused():
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    esm = {**small, "intermediate_size": 48, "pad_token_id": 1, "mask_token_id": 3}
    return [
        (tiny("llama"), "global queries see everything; LlamaForCausalLM is causal, leave it out"),
        (tiny("gpt2"), "GPT2LMHeadModel is causal"),
        (tiny("modernbert"), "separate query, key and value layers, which ModernBertForMaskedLM has not"),
        (
            transformers.EsmModel(transformers.EsmConfig(**esm, position_embedding_type="rotary")),
            "EsmSelfAttention rotates, scales, normalises or bounds them",
        ),
    ]


@pytest.mark.parametrize("number", range(4))
def test_a_model_that_cannot_have_them_is_refused_and_left_alone(number):
    model, message = _refused()[number]
    keys = model.state_dict().keys()
    with pytest.raises(ValueError, match=message):
        hf_sparse.patch_model(model, APART)
    assert model.state_dict().keys() == keys and settings(model) is None
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_what_they_do_not_go_with_is_refused():
    with pytest.raises(ValueError, match="gives projections to all heads of a layer, got it for some"):
        hf_sparse.patch_model(tiny("bert"), PerHead((APART, APART, Full(), Full())))
    model = hf_sparse.patch_model(tiny("bert"), APART)
    with pytest.raises(
        ValueError, match="global_projections=True global queries and other queries weigh different"
    ):
        model(tokens(1, 9), output_attentions=True)


def test_every_architecture_with_plain_projections_takes_them():
    small = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 1}
    small |= {"hidden_size": 32, "intermediate_size": 48}
    distil = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    for name, options in [
        ("Electra", small),
        ("XLMRoberta", small),
        ("Albert", {**small, "embedding_size": 16}),  # one set of layers for all
        ("DistilBert", distil),
    ]:
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}Model")(
            getattr(transformers, f"{name}Config")(**options)
        ).eval()
        ids = tokens(1, 20)
        with torch.no_grad():
            expected = hf_sparse.patch_model(model, SHARED)(ids)[0]
            got = hf_sparse.patch_model(model, APART)(ids)[0]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
        assert len(_added(model)) == (6 if name == "Albert" else 12)
