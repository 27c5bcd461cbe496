"""Learned sinks that patching adds: where they go, that they train, and that they come back or are refused."""

import copy

import pytest
import torch
import transformers
from tiny_models import ALL, logits, tiny, tokens

import hf_sparse
from hf_sparse import Longformer, SlidingWindow, StreamingLLM
from hf_sparse.hf import SparseSettings, settings, settings_from_json, settings_to_json, unpatched
from hf_sparse.hf.computed import computed_by, dense_instead
from hf_sparse.hf.learned_sinks import NAME, SCALE, sinks

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

WINDOW = SlidingWindow(4)
IDS = tokens(2, 20)


def with_sinks(name="llama", pattern=WINDOW, **options):
    return hf_sparse.patch_model(tiny(name), pattern, learned_sinks=True, **options)


def own_weights(model):
    return {key: weight for key, weight in model.named_parameters() if f".{NAME}." in key}


def moved(model, by=-1.0):
    """Move the sinks to where they show, differently for each head."""
    with torch.no_grad():
        for number, weight in enumerate(own_weights(model).values()):
            weight.add_((by + torch.arange(len(weight)) / (number + 1)) / SCALE)
    return model


@pytest.mark.parametrize("name", ALL)
def test_every_architecture_gets_one_per_head_and_layer_and_trains_it(name):
    model = with_sinks(name)
    own = own_weights(model)
    assert [tuple(weight.shape) for weight in own.values()] == [(4,), (4,)]
    assert all(weight.dtype == torch.float32 and weight.requires_grad for weight in own.values())
    plain = logits(hf_sparse.patch_model(tiny(name), WINDOW), IDS)
    assert not any(weight.any() for weight in own.values())
    model.eval()(input_ids=IDS, labels=IDS).loss.backward()
    assert all((weight.grad != 0).all() and weight.grad.isfinite().all() for weight in own.values())
    # At minus infinity they are none.
    with torch.no_grad():
        for weight in own.values():
            weight.fill_(float("-inf"))
    torch.testing.assert_close(logits(model, IDS), plain, atol=1e-5, rtol=1e-5)


def test_the_reference_gives_the_same():
    both = [moved(with_sinks(backend=backend)) for backend in ("torch", "reference")]
    torch.testing.assert_close(*(logits(model, IDS) for model in both), atol=1e-5, rtol=1e-5)
    for model in both:
        model(IDS, labels=IDS).loss.backward()
    for one, other in zip(*(model.parameters() for model in both), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "pattern", [WINDOW, StreamingLLM(sinks=2, window=4), StreamingLLM(2, 4, positions="cache")], ids=str
)
def test_a_cache_changes_nothing(pattern):
    model = moved(with_sinks(pattern=pattern))
    ids, parts, cache = IDS[:1], [], hf_sparse.make_cache(model)
    with torch.no_grad():
        for chunk in ids.split([7, 1, 1, 11], dim=1):
            parts.append(model(chunk, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), logits(model, ids), atol=1e-5, rtol=1e-5)
    both = [model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*both)


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointed in (False, True):
        model = moved(with_sinks()).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([weight.grad for weight in own_weights(model).values()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_the_dense_teacher_has_none():
    model = moved(with_sinks())
    with computed_by(model, dense_instead, is_dense=True):
        out = logits(model, IDS)
    torch.testing.assert_close(out, logits(tiny("llama"), IDS), atol=1e-5, rtol=1e-5)


def test_only_sparse_layers_get_them():
    assert list(own_weights(with_sinks(layers=[1]))) == [f"model.layers.1.self_attn.{NAME}.weight"]
    layered = hf_sparse.Layered(pattern="sliding_window", dense_every=2)
    assert list(own_weights(with_sinks(pattern=layered))) == [f"model.layers.0.self_attn.{NAME}.weight"]


def test_unpatching_and_patched_put_back_what_was_there():
    before = logits(tiny("llama"), IDS)
    model = moved(with_sinks())
    trained = logits(model, IDS)
    with unpatched(model):
        assert not own_weights(model) and torch.equal(logits(model, IDS), before)
    assert torch.equal(logits(model, IDS), trained)
    with hf_sparse.patched(model, "strided", stride=3):
        assert not own_weights(model) and not settings(model).learned_sinks
    with hf_sparse.patched(model, SlidingWindow(6), learned_sinks=True):
        assert len(own_weights(model)) == 2
    assert torch.equal(logits(model, IDS), trained)
    # Patching again keeps what was trained; without the option they go.
    assert torch.equal(logits(hf_sparse.patch_model(model, WINDOW, learned_sinks=True), IDS), trained)
    hf_sparse.unpatch_model(model)
    assert torch.equal(logits(model, IDS), before)
    assert model.state_dict().keys() == tiny("llama").state_dict().keys()
    hf_sparse.patch_model(hf_sparse.patch_model(model, WINDOW, learned_sinks=True), WINDOW)
    assert not sinks(model)


def test_two_models_and_copies_are_independent():
    one, plain = moved(with_sinks()), hf_sparse.patch_model(tiny("llama"), WINDOW)
    other = copy.deepcopy(one)
    before, alone = logits(one, IDS), logits(plain, IDS)
    moved(other)
    assert torch.equal(logits(one, IDS), before) and torch.equal(logits(plain, IDS), alone)
    assert not torch.equal(logits(other, IDS), before)
    hf_sparse.unpatch_model(other)
    assert torch.equal(logits(one, IDS), before)


@pytest.mark.parametrize(
    ("pattern", "options", "message"),
    [
        ("full", {}, "leaves every layer of LlamaForCausalLM dense; leave it out"),
        (WINDOW, {"layers": [7]}, "layers must hold indices"),
    ],
)
def test_what_has_no_place_for_them_is_refused_and_left_as_it_was(pattern, options, message):
    model = tiny("llama")
    with pytest.raises(ValueError, match=message):
        hf_sparse.patch_model(model, pattern, learned_sinks=True, **options)
    assert settings(model) is None and not sinks(model)


def test_other_refusals():
    apart = Longformer(window=3, global_tokens=(0,), global_projections=True)
    with pytest.raises(ValueError, match="does not go with global_projections=True"):
        with_sinks("bert", apart)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(tiny("llama").config)
    with pytest.raises(ValueError, match="no weights yet"):
        hf_sparse.patch_model(model, WINDOW, learned_sinks=True)


def test_settings_survive_json_and_old_ones_are_read():
    ours = SparseSettings(WINDOW, (0,), "torch", learned_sinks=True)
    assert settings_from_json(settings_to_json(ours)) == ours
    old = settings_to_json(SparseSettings(WINDOW))
    assert "learned_sinks" not in old and not settings_from_json(old).learned_sinks
    with pytest.raises(ValueError, match="learned_sinks true or false, got 1"):
        settings_from_json({**old, "learned_sinks": 1})


def test_describe_says_so():
    text = hf_sparse.describe(with_sinks(layers=[1]))
    assert "sinks     learned: a logit per query head joins the softmax in 1 layers" in text
    assert "dense where" not in text


@pytest.mark.parametrize("shards", [False, True])
def test_a_saved_model_comes_back_with_them(shards, tmp_path):
    model = moved(with_sinks())
    model.save_pretrained(tmp_path, max_shard_size="20KB" if shards else "1GB")
    loaded = hf_sparse.load(tmp_path)
    assert settings(loaded) == settings(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))
    named = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, attn_implementation="sparse_sliding_window"
    )
    with pytest.raises(ValueError, match=r"LlamaAttention has none of the learned sinks .* hf_sparse\.load"):
        logits(named, IDS)


def test_a_checkpoint_that_lacks_some_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    with_sinks().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[f"model.layers.1.self_attn.{NAME}.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks 1 weights that its pattern adds, such as .*{NAME}\.weight"):
        hf_sparse.load(tmp_path)


@pytest.fixture
def lora(tmp_path):
    """Return a function that puts LoRA on a patched model read from a folder, with further arguments."""
    from peft import LoraConfig, get_peft_model

    tiny("llama").save_pretrained(tmp_path / "base")

    def make(base=tmp_path / "base", **arguments):
        model = transformers.LlamaForCausalLM.from_pretrained(base)
        hf_sparse.patch_model(model, WINDOW, learned_sinks=True)
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **arguments)
        return get_peft_model(model, config).eval()

    return make


def test_an_adapter_holds_them(lora, tmp_path):
    model = lora(modules_to_save=[NAME])
    bare = logits(model, IDS)
    trained = [key for key, weight in model.named_parameters() if weight.requires_grad and NAME in key]
    assert len(trained) == 2 and all(f"{NAME}.modules_to_save.default.weight" in key for key in trained)
    with torch.no_grad():
        for key in trained:
            model.get_parameter(key).add_(3.0 / SCALE)
    full = logits(model, IDS)
    assert (full - bare).abs().max() > 1e-2
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, IDS), bare, atol=1e-6, rtol=1e-5)
    hf_sparse.save_adapter(model, tmp_path / "adapter")
    loaded = hf_sparse.load(tmp_path / "adapter")
    assert settings(loaded).learned_sinks
    torch.testing.assert_close(logits(loaded, IDS), full, atol=1e-6, rtol=1e-5)
    onto = hf_sparse.load_adapter(
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    torch.testing.assert_close(logits(onto, IDS), full, atol=1e-6, rtol=1e-5)
    without = hf_sparse.patch_model(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"), WINDOW)
    with pytest.raises(
        ValueError, match=r"was trained under .* with learned sinks, and LlamaForCausalLM runs"
    ):
        hf_sparse.load_adapter(without, tmp_path / "adapter")
    with hf_sparse.patched(loaded, "strided", stride=3):
        assert not sinks(loaded.get_base_model())
    torch.testing.assert_close(logits(loaded, IDS), full, atol=1e-6, rtol=1e-5)


def test_an_adapter_that_would_lose_them_is_refused(lora, tmp_path):
    model = lora()
    hf_sparse.save_adapter(model, tmp_path / "fresh")  # nothing to lose
    torch.testing.assert_close(logits(hf_sparse.load(tmp_path / "fresh"), IDS), logits(model, IDS))
    moved(model)
    with pytest.raises(ValueError, match=rf"{NAME} was trained but .* modules_to_save=\['{NAME}'\]"):
        hf_sparse.save_adapter(model, tmp_path / "adapter")


def test_a_base_saved_with_them_gives_them_to_its_adapters(tmp_path):
    from peft import LoraConfig, get_peft_model

    moved(with_sinks()).save_pretrained(tmp_path / "trained")
    model = get_peft_model(
        hf_sparse.load(tmp_path / "trained"), LoraConfig(r=2, target_modules=["q_proj"])
    ).eval()
    hf_sparse.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(hf_sparse.load(tmp_path / "adapter"), IDS), logits(model, IDS))
