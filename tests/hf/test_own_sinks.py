"""Models that were trained with attention sinks keep them under a pattern."""

import copy

import pytest
import torch
from tiny_models import _ROPE, logits, random_model, tokens

import hf_sparse
from hf_sparse import PerHead, PerLayer, SlidingWindow, StreamingLLM
from hf_sparse.backends import recording
from hf_sparse.hf.computed import computed_by, dense_instead

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

_OWN = {
    **_ROPE,
    "head_dim": 8,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
MODELS = {
    "gpt_oss": ("GptOssForCausalLM", _OWN),
    "granite_swa": ("GraniteSWAForCausalLM", {k: v for k, v in _OWN.items() if "expert" not in k}),
}
N = 23
CLOSE = {"atol": 2e-5, "rtol": 1e-5}  # logits up to 6, through two layers


def tiny(name="gpt_oss", implementation=None):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, MODELS[name][0]):
        pytest.skip(f"this transformers has no {MODELS[name][0]}")
    model = random_model(*MODELS[name])
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for weight_name, weight in model.named_parameters():
            if weight_name.endswith("sinks"):  # some with next to nothing, some with most of a row
                weight.copy_(torch.linspace(-2.0, 3.0, 4)[torch.randperm(4, generator=generator)])
    if implementation is not None:
        model.set_attn_implementation(implementation)
    return model


def masked(pattern, rows=2):
    """Return the additive masks of the eager model under a pattern: its own window in the sliding layer as well."""
    query, key = torch.arange(N)[:, None], torch.arange(N)

    def additive(allowed):
        return torch.zeros(N, N).masked_fill(~allowed, torch.finfo(torch.float32).min).expand(rows, 1, N, N)

    own = pattern.mask(N)[0]
    return {"full_attention": additive(own), "sliding_attention": additive(own & (query - key < 9))}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", ["torch", "auto", "reference"])
@pytest.mark.parametrize(
    "pattern", [SlidingWindow(64), SlidingWindow(5), StreamingLLM(sinks=2, window=4)], ids=str
)
def test_logits_and_gradients_are_those_of_the_models_own_attention(name, pattern, backend):
    ids = tokens(2, N)
    eager, sparse = tiny(name, "eager"), hf_sparse.patch_model(tiny(name), pattern, backend=backend)
    losses = eager(ids, labels=ids, attention_mask=masked(pattern)), sparse(ids, labels=ids)
    torch.testing.assert_close(losses[1].logits, losses[0].logits, **CLOSE)
    for each in losses:
        each.loss.backward()
    own = dict(eager.named_parameters())
    for weight_name, weight in sparse.named_parameters():
        if (expected := own[weight_name].grad) is None:
            assert weight.grad is None, weight_name
            continue
        torch.testing.assert_close(weight.grad, expected, atol=1e-5, rtol=1e-4, msg=weight_name)
    assert all(
        weight.grad.abs().min() > 0 for key, weight in sparse.named_parameters() if key.endswith("sinks")
    )


def test_where_the_pattern_leaves_nothing_out_no_dense_operator_drops_them():
    with recording() as seen:
        out = logits(hf_sparse.patch_model(tiny(), "full"), tokens(2, N))
    assert {(call.backend, call.operator) for call in seen.calls} == {("torch", "flash+tiled")}
    torch.testing.assert_close(out, logits(tiny("gpt_oss", "eager"), tokens(2, N)), **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_changes_nothing(name):
    ids = tokens(1, N)
    ragged = PerLayer(
        (SlidingWindow(4), PerHead((SlidingWindow(3), SlidingWindow(3), SlidingWindow(6), SlidingWindow(6))))
    )
    for pattern in (SlidingWindow(5), StreamingLLM(sinks=2, window=4), ragged):
        model = hf_sparse.patch_model(tiny(name), pattern)
        whole = logits(model, ids)
        cache, parts = hf_sparse.make_cache(model), []
        with torch.no_grad():
            for chunk in ids.split([9, 1, 1, 5, 7], dim=1):
                parts.append(model(chunk, past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
        both = [
            model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)
        ]
        assert torch.equal(*both)


def test_padding_and_weights():
    ids, mask = tokens(2, N), torch.ones(2, N, dtype=torch.long)
    mask[0, :6] = 0
    model = hf_sparse.patch_model(tiny(), StreamingLLM(sinks=2, window=4))
    out = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(out[0, 6:], logits(model, ids[:1, 6:])[0], **CLOSE)
    eager = tiny("gpt_oss", "eager")
    given = {"input_ids": ids, "output_attentions": True}
    with torch.no_grad():
        pattern = StreamingLLM(sinks=2, window=4)
        pairs = zip(
            model(**given).attentions, eager(**given, attention_mask=masked(pattern)).attentions, strict=True
        )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert (ours.sum(-1) < 0.999).any()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_as_its_own_dense_teacher_it_keeps_them(checkpointed):
    ids = tokens(2, N)
    model = hf_sparse.patch_model(tiny(), SlidingWindow(3))
    if checkpointed:
        model.gradient_checkpointing_enable()
        model.train()
    with computed_by(model, dense_instead, is_dense=True):
        out = model(ids, use_cache=False).logits
    torch.testing.assert_close(out, logits(tiny("gpt_oss", "eager"), ids), **CLOSE)


def test_learned_ones_beside_them_are_refused_and_the_model_is_left_alone():
    model = tiny()
    before, state = logits(model, tokens(1, N)), copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"GptOssAttention has attention sinks of its own, .* leave learned_sinks out"
    ):
        hf_sparse.patch_model(model, "sliding_window", window=3, learned_sinks=True)
    assert model.state_dict().keys() == state.keys()
    assert torch.equal(logits(model, tokens(1, N)), before)


def test_describe_says_so():
    text = hf_sparse.describe(hf_sparse.patch_model(tiny(), "sliding_window", window=5))
    assert "sinks     the model's own, a logit per query head" in text and "dense where" not in text


def test_a_process_that_holds_some_heads_takes_their_sinks():
    from hf_sparse.hf import hold_heads
    from hf_sparse.hf.attention import sparse_attention

    model = hf_sparse.patch_model(tiny(), "sliding_window", window=5)
    module = model.model.layers[0].self_attn
    q, k = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8)
    own = {"s_aux": module.sinks}
    whole, _ = sparse_attention(module, q, k, k, None, **own)
    with pytest.raises(ValueError, match="holds 2 of 4 query heads, each with a sink, and nobody said which"):
        sparse_attention(module, q[:, 2:], k[:, 1:], k[:, 1:], None, **own)
    hold_heads(model, 2)
    part, _ = sparse_attention(module, q[:, 2:], k[:, 1:], k[:, 1:], None, **own)
    torch.testing.assert_close(part, whole[:, :, 2:])


def test_calibration_weighs_keys_beside_them():
    """Dense under a calibration is the model's own attention; the weights that it sees are those of the eager model."""
    from hf_sparse import Full
    from hf_sparse.calibrate.gated import Gated
    from hf_sparse.calibrate.scores.attention_mass import lost_mass
    from hf_sparse.calibrate.units import units_of

    model, ids, lost = tiny(), tokens(1, N), []
    gated = Gated(model, units_of(model, "head"), (Full(), SlidingWindow(4)), "auto")
    with torch.no_grad(), gated.watching(lambda seen: lost.append(lost_mass(seen, gated.candidates)[:, 1])):
        out = model(ids).logits
        eager = tiny("gpt_oss", "eager")(ids, output_attentions=True)
    torch.testing.assert_close(out, eager.logits, **CLOSE)
    far = torch.ones(N, N, dtype=torch.bool).tril(-4)
    for ours, weights in zip(lost, eager.attentions, strict=True):
        torch.testing.assert_close(ours, (weights[0] * far).sum((1, 2)) / N, atol=1e-5, rtol=1e-4)
