"""Global tokens of one call, `global_attention_mask` and `token_ids`: in every row, model and thread."""

import copy
import threading

import pytest
import torch
from tiny_models import (
    ALL,
    DECODERS,
    ENCODERS,
    LENGTHS,
    PLACES,
    logits,
    longformer,
    rows_with_globals,
    tiny,
    tokens,
)
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import Longformer, SlidingWindow
from hf_sparse.hf.mask import running_forwards
from hf_sparse.patterns.global_tokens import GlobalTokens

# peft still asks for the old name of what transformers now calls activation checkpointing
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
GREEDY = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 1}


def _alone(name, row):
    """Return the logits of one row whose globals are fixed positions of the pattern."""
    return logits(longformer(name, global_tokens=PLACES[row]), tokens(1, LENGTHS[row], seed=row))[0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ALL)
def test_each_row_has_its_own_globals_whatever_the_padding(name, side):
    ids, mask, chosen = rows_with_globals(side)
    places = {} if name == "roberta" else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    model = longformer(name)
    got = logits(model, ids, attention_mask=mask, global_attention_mask=chosen, **places)
    local = logits(model, ids, attention_mask=mask, **places)
    for row in range(3):
        real = mask[row] == 1
        torch.testing.assert_close(got[row, real], _alone(name, row), **CLOSE)
        differs = (got[row, real] - local[row, real]).abs().max() > 1e-3
        assert differs == bool(PLACES[row])


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_packed_samples_have_their_own_globals(name):
    rows = [tokens(1, length, seed=row) for row, length in enumerate(LENGTHS)]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    chosen = torch.cat(
        [torch.isin(torch.arange(n), torch.tensor(p)) for n, p in zip(LENGTHS, PLACES, strict=True)]
    )
    packed = logits(
        longformer(name), torch.cat(rows, 1), position_ids=positions, global_attention_mask=chosen[None]
    )
    torch.testing.assert_close(packed[0], torch.cat([_alone(name, row) for row in range(3)]), **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "modernbert"])
def test_token_ids_are_global_wherever_they_occur_besides_the_mask(name):
    pattern = SlidingWindow(3) | GlobalTokens(positions=(), token_ids=(1, 7))
    model = hf_sparse.patch_model(tiny(name), pattern)
    ids, mask, chosen = rows_with_globals("right")
    ids[0, 11] = ids[1, 3] = 7
    found = chosen | ((ids == 7) & (mask == 1)).long()  # the pads, token 1, are not
    expected = logits(longformer(name), ids, attention_mask=mask, global_attention_mask=found)
    got = logits(model, ids, attention_mask=mask, global_attention_mask=chosen)
    torch.testing.assert_close(got[mask == 1], expected[mask == 1], **CLOSE)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "modernbert"])
def test_gradient_checkpointing_recomputes_with_the_same_globals(name, reentrant):
    model = longformer(name).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids, mask, chosen = rows_with_globals("left")

    def gradients():
        model.zero_grad(set_to_none=True)
        model(ids, attention_mask=mask, global_attention_mask=chosen, labels=ids).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed = gradients()
    for key in plain:
        torch.testing.assert_close(checkpointed[key], plain[key], atol=1e-6, rtol=1e-5)
    model.zero_grad(set_to_none=True)
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    assert any(
        not torch.allclose(p.grad, plain[k]) for k, p in model.named_parameters() if p.grad is not None
    )


def test_a_peft_model_takes_them_too():
    from peft import LoraConfig, get_peft_model

    ids, mask, chosen = rows_with_globals("left")
    given = {"attention_mask": mask, "global_attention_mask": chosen}
    base = longformer("llama")
    expected, words = logits(base, ids, **given), base.generate(ids, **given, **GREEDY)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    assert torch.equal(logits(model, ids, **given), expected)
    assert torch.equal(model.generate(input_ids=ids, **given, **GREEDY), words)
    hf_sparse.unpatch_model(model)
    with pytest.raises(ValueError, match=r"model_kwargs.* are not used by the model"):
        model.generate(input_ids=ids, **given, **GREEDY)


def test_threads_and_models_do_not_mix_their_globals():
    models = {window: longformer("llama", window=window) for window in (2, 4)}
    ids, failures = tokens(1, 20), []
    chosen = {place: torch.isin(torch.arange(20), place)[None].long() for place in (3, 6, 9)}
    expected = {
        (w, p): logits(model, ids, global_attention_mask=chosen[p])
        for w, model in models.items()
        for p in chosen
    }

    def work(window, place):
        for _ in range(5):
            if not torch.equal(
                logits(models[window], ids, global_attention_mask=chosen[place]), expected[window, place]
            ):
                failures.append((window, place))

    threads = [threading.Thread(target=work, args=key) for key in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("hooks", [True, False])
def test_a_model_called_within_anothers_forward_has_its_own_globals(hooks):
    outer, inner = longformer("llama"), longformer("llama")
    if not hooks:  # settings without what patch_model adds, as after from_pretrained(attn_implementation=...)
        inner = AutoModelForCausalLM.from_config(inner.config, attn_implementation="sparse_longformer").eval()
    ids, chosen = tokens(1, 20), torch.isin(torch.arange(20), 4)[None].long()
    expected, local = logits(outer, ids, global_attention_mask=chosen), logits(inner, ids)
    within = []
    outer.model.embed_tokens.register_forward_hook(lambda *_: within.append(logits(inner, ids)))
    assert torch.equal(logits(outer, ids, global_attention_mask=chosen), expected)
    assert torch.equal(within[0], local)


def test_a_forward_that_fails_leaves_nothing_behind():
    model, ids = longformer("llama"), tokens(1, 12)
    handle = model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model, ids, global_attention_mask=torch.ones_like(ids))
    handle.remove()
    assert not running_forwards()
    with pytest.raises(ValueError, match="must be 0"):
        logits(model, ids, global_attention_mask=torch.full_like(ids, 2))
    assert not running_forwards()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (torch.zeros(2, 11), r"must hold 0 or 1 for each token seen, \[2, 12\], got \(2, 11\)"),
        (torch.zeros(12), r"got \(12,\)"),
        (torch.zeros(1, 12), r"got \(1, 12\)"),
        ([[0] * 12] * 2, "got list"),
        (torch.full((2, 12), 2), r"must be 0 \(local\) or 1 \(global\) for each token, got 2"),
        (torch.full((2, 12), 0.5), "got 0.5"),
        (
            torch.eye(2, 12),
            "makes token 0 of row 0 global, which attention_mask says is padding; set it to 0",
        ),
    ],
    ids=lambda value: str(value)[-30:],
)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_mask_that_cannot_be_meant_is_refused(name, chosen, message):
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :2] = 0
    with pytest.raises(ValueError, match=message):
        logits(longformer(name), tokens(2, 12), attention_mask=mask, global_attention_mask=chosen)


@pytest.mark.parametrize("name", ALL)
def test_a_pattern_without_globals_refuses_them(name):
    model, ids = hf_sparse.patch_model(tiny(name), "sliding_window", window=3), tokens(1, 12)
    with pytest.raises(
        ValueError, match=r"but sliding_window\(window=3\) takes no globals from a call; patch with"
    ):
        logits(model, ids, global_attention_mask=torch.ones_like(ids))
    logits(model, ids, global_attention_mask=None)
    if name in DECODERS:
        with pytest.raises(ValueError, match=r"not used by the model: \['global_attention_mask'\]"):
            model.generate(ids, global_attention_mask=torch.ones_like(ids), **GREEDY)


def test_a_name_alone_does_not_understand_them():
    ids, config = tokens(1, 12), tiny("llama").config
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sparse_longformer").eval()
    with pytest.raises(
        ValueError, match=r"understood by a model that hf_sparse\.patch_model .* has prepared"
    ):
        logits(model, ids, global_attention_mask=torch.ones_like(ids))
    logits(model, ids)
    saved = hf_sparse.patch_model(tiny("llama"), "global_tokens", token_ids=(7,)).config
    model = AutoModelForCausalLM.from_config(saved, attn_implementation="sparse_global_tokens").eval()
    with pytest.raises(
        ValueError, match=r"token_ids=\(7,\) are found by a model that hf_sparse\.patch_model"
    ):
        logits(model, ids)


def test_globals_go_with_embedded_inputs():
    model, ids = longformer("llama"), tokens(1, 12)
    chosen = torch.isin(torch.arange(12), 4)[None].long()
    with torch.no_grad():
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids), global_attention_mask=chosen).logits
    assert torch.equal(embedded, logits(model, ids, global_attention_mask=chosen))


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_unpatching_and_patching_again_leave_no_hook_behind(name):
    ids = tokens(1, 12)
    model = longformer(name)
    given = {"global_attention_mask": torch.isin(torch.arange(12), 4)[None].long()}
    before = logits(model, ids, **given)
    twin = copy.deepcopy(model)
    with (
        hf_sparse.patched(model, "sliding_window", window=2),
        pytest.raises(ValueError, match="takes no globals"),
    ):
        logits(model, ids, **given)
    assert torch.equal(logits(model, ids, **given), before)
    hf_sparse.patch_model(model, Longformer(window=3, global_tokens=()))
    assert torch.equal(logits(model, ids, **given), before)
    if name not in ENCODERS:
        words = model.generate(ids, **given, **GREEDY)
        assert torch.equal(twin.generate(ids, **given, **GREEDY), words)
    hf_sparse.unpatch_model(model)
    assert torch.equal(logits(model, ids), logits(tiny(name), ids))
    assert torch.equal(logits(twin, ids, **given), before)
    hf_sparse.unpatch_model(twin)
    for unpatched in (model, twin):
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in unpatched.modules())
        assert "prepare_inputs_for_generation" not in vars(unpatched)


def test_a_model_that_drops_the_mask_on_its_way_refuses_it():
    model = tiny("bert")
    forward = type(model).forward

    def dropping(input_ids=None, attention_mask=None, **kwargs):
        return forward(model, input_ids=input_ids, attention_mask=attention_mask)

    model.forward = dropping
    hf_sparse.patch_model(model, "longformer", window=3, global_tokens=(0,))
    ids = tokens(1, 12)
    logits(model, ids)
    with pytest.raises(
        ValueError, match="BertForMaskedLM does not hand global_attention_mask on to its layers"
    ):
        logits(model, ids, global_attention_mask=torch.ones_like(ids))


def test_describe_mentions_globals_of_a_call():
    model = hf_sparse.patch_model(tiny("llama"), SlidingWindow(3) | GlobalTokens((0,), token_ids=(7,)))
    text = hf_sparse.describe(model)
    assert "each call's global_attention_mask, and the tokens (7,) of the input" in text


def test_another_attention_set_in_our_place_runs_and_refuses_them():
    ids = tokens(2, 12)
    model = longformer("llama")
    model.set_attn_implementation("eager")
    assert torch.equal(logits(model, ids), logits(tiny("llama", "eager"), ids))
    with pytest.raises(ValueError, match="'eager' attention is set, which has no use for it"):
        model(ids, global_attention_mask=torch.zeros_like(ids))
    model.set_attn_implementation("sparse_longformer")
    assert torch.equal(logits(model, ids), logits(longformer("llama"), ids))
