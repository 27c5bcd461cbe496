"""A saved model or adapter comes back with its pattern, or is refused in one sentence."""

import json
import os

import pytest
import torch
from tiny_models import logits, tiny, tokens
from transformers import AutoConfig, AutoModelForCausalLM

import hf_sparse
from hf_sparse import Longformer, SlidingWindow, StreamingLLM
from hf_sparse.hf import settings

# peft still asks for the old name of what transformers now calls activation checkpointing
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bert", "modernbert"])
def test_a_saved_model_comes_back_with_its_pattern(name, tmp_path):
    ids = tokens(1, 20)
    model = hf_sparse.patch_model(tiny(name), SlidingWindow(3) | Longformer(2, (0, 5)), layers=[1])
    before = logits(model, ids)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["sparse_attention"] == model.config.sparse_attention
    loaded = hf_sparse.load(tmp_path)
    assert type(loaded) is type(model) and settings(loaded) == settings(model)
    assert torch.equal(logits(loaded, ids), before)
    hf_sparse.unpatch_model(loaded)
    torch.testing.assert_close(logits(loaded, ids), logits(tiny(name), ids), atol=1e-5, rtol=1e-4)


def test_from_pretrained_by_name_uses_the_saved_options_and_refuses_another_name(tmp_path):
    ids = tokens(1, 20)
    model = hf_sparse.patch_model(tiny("llama"), "longformer", window=3, global_tokens=(0, 2))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sparse_longformer")
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    other = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sparse_strided")
    with pytest.raises(
        ValueError, match=r"attn_implementation='sparse_strided' but .* saved with 'sparse_longformer'"
    ):
        logits(other, ids)


def test_from_pretrained_by_name_alone_uses_the_default_options(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sparse_strided")
    ids = tokens(1, 100)
    assert torch.equal(logits(loaded, ids), logits(hf_sparse.patch_model(tiny("llama"), "strided"), ids))


def test_from_pretrained_by_name_and_save_again_keeps_a_config_without_settings(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", attn_implementation="sparse_strided")
    loaded.save_pretrained(tmp_path / "b")
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "b"), "sparse_attention")


@pytest.fixture
def adapter(tmp_path):
    """Return (base folder, adapter folder, ids, logits) of a trained adapter of a patched model."""
    from peft import LoraConfig, get_peft_model

    base_folder, folder = tmp_path / "base", tmp_path / "adapter"
    tiny("llama").save_pretrained(base_folder)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    hf_sparse.patch_model(base, "streaming_llm", sinks=2, window=3)
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    torch.manual_seed(0)
    model = get_peft_model(base, config).eval()
    hf_sparse.save_adapter(model, folder)
    ids = tokens(1, 20)
    return base_folder, folder, ids, logits(model, ids)


def test_an_adapter_comes_back_on_its_patched_base(adapter):
    _, folder, ids, before = adapter
    assert sorted(p.name for p in folder.iterdir() if p.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "sparse_attention.json",
    ]
    model = hf_sparse.load(folder)
    assert torch.equal(logits(model, ids), before)
    assert settings(model).pattern == StreamingLLM(sinks=2, window=3)
    assert not any(p.requires_grad for p in model.parameters())
    assert any(p.requires_grad for p in hf_sparse.load(folder, is_trainable=True).parameters())
    assert not [p for p in folder.parent.iterdir() if p.name.startswith(".")]  # nothing half-written is left


def test_saving_an_adapter_again_replaces_it(adapter):
    _, folder, ids, before = adapter
    model = hf_sparse.load(folder)
    hf_sparse.patch_model(model, "strided", stride=3)
    hf_sparse.save_adapter(model, folder)
    again = hf_sparse.load(folder)
    assert settings(again).pattern == hf_sparse.Strided(3)
    assert torch.equal(logits(again, ids), logits(model, ids)) and not torch.equal(logits(again, ids), before)


def test_an_interrupted_save_does_not_load(adapter, monkeypatch):
    _, folder, _, _ = adapter
    model, replace = hf_sparse.load(folder), os.replace

    def fail(source, target):
        if str(target).endswith(".safetensors"):
            raise OSError("No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        hf_sparse.save_adapter(model, folder)
    assert not [p for p in folder.parent.iterdir() if p.name.startswith(".")]
    with pytest.raises(ValueError, match=r"has no sparse_attention\.json"):
        hf_sparse.load(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sparse_attention.json", None, "has no sparse_attention.json, so its pattern is unknown"),
        ("sparse_attention.json", b'{"version": 1, "pat', "sparse_attention.json is not readable JSON"),
        ("sparse_attention.json", b"\xff\xfe\x00", "sparse_attention.json is not readable JSON"),
        ("sparse_attention.json", b"[]", "must hold a JSON object"),
        ("sparse_attention.json", b'{"version": 9, "pattern": {"name": "full"}}', "has version 9"),
        ("adapter_model.safetensors", None, "has no adapter_model.safetensors"),
        ("adapter_model.safetensors", b"", "adapter_model.safetensors is corrupt"),
        (
            "adapter_model.safetensors",
            b"\x10\x00\x00\x00\x00\x00\x00\x00{garbage",
            "adapter_model.safetensors is corrupt",
        ),
        ("adapter_config.json", None, "has no adapter_config.json"),
        ("adapter_config.json", b"{", "adapter_config.json is not readable JSON"),
        ("adapter_config.json", b'{"peft_type": "LORA"}', "names no base model"),
        ("adapter_config.json", b"{}", "is of the type None, which peft .* does not have; update peft"),
        (
            "adapter_config.json",
            b'{"peft_type": "LORA", "base_model_name_or_path": "/no/such/model"}',
            "the base model of adapter .*: there is no folder /no/such/model; check the spelling",
        ),
    ],
)
def test_a_damaged_adapter_is_refused(adapter, name, content, message):
    _, folder, _, _ = adapter
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        hf_sparse.load(folder)
    assert "\n" not in str(caught.value)


def test_a_truncated_adapter_and_an_unknown_adapter_type_are_refused(adapter):
    _, folder, _, _ = adapter
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="is corrupt"):
        hf_sparse.load(folder)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "NOTHING"}))
    with pytest.raises(ValueError, match="is of the type 'NOTHING', which peft"):
        hf_sparse.load(folder)


def test_a_damaged_or_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*nothing; check the spelling"):
        hf_sparse.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="the name of the model is empty"):
        hf_sparse.load("")
    tiny("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="was saved without a pattern"):
        hf_sparse.load(tmp_path / "dense")
    hf_sparse.patch_model(tiny("llama"), "full").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="reads safetensors only"):
        hf_sparse.load(tmp_path / "model", use_safetensors=False)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        hf_sparse.load(tmp_path / "model")
    assert "\n" not in str(caught.value)
    weights.rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded"):
        hf_sparse.load(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["sparse_attention"]["pattern"]["name"] = "org/repository"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="unknown pattern 'org/repository'"):
        hf_sparse.load(tmp_path / "model")


def test_save_adapter_refuses_what_it_cannot_save(tmp_path):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match="save_adapter needs a PeftModel, got LlamaForCausalLM"):
        hf_sparse.save_adapter(hf_sparse.patch_model(tiny("llama"), "full"), tmp_path / "a")
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="needs a patched model"):
        hf_sparse.save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_weights_that_are_missing_are_refused(tmp_path):
    """Transformers would only warn, and leave them at random."""
    from safetensors.torch import load_file, save_file

    model = hf_sparse.patch_model(tiny("llama"), "sliding_window", window=4)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of LlamaForCausalLM, such as model\.norm\.weight"):
        hf_sparse.load(tmp_path)


def test_a_base_that_lacks_weights_is_refused_except_for_the_head_the_adapter_brings(tmp_path):
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForSequenceClassification

    tiny("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    hf_sparse.patch_model(base, "full")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    hf_sparse.save_adapter(model, tmp_path / "adapter")
    head = hf_sparse.load(tmp_path / "adapter").base_model.model.score.modules_to_save["default"].weight
    assert torch.equal(head, model.base_model.model.score.modules_to_save["default"].weight)

    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    config = tmp_path / "adapter" / "adapter_config.json"
    for task, missing in (
        ("SEQ_CLS", r"LlamaForSequenceClassification, such as model\.norm\.weight"),
        ("FEATURE_EXTRACTION", r"LlamaModel, such as norm\.weight"),
        ("CAUSAL_LM", r"LlamaForCausalLM, such as model\.norm\.weight"),
    ):
        config.write_text(json.dumps({**json.loads(config.read_text()), "task_type": task}))
        with pytest.raises(ValueError, match=rf"base lacks 1 weights of {missing}"):
            hf_sparse.load(tmp_path / "adapter")


def test_an_adapter_that_lacks_weights_is_refused(adapter):
    from safetensors.torch import load_file, save_file

    _, folder, _, _ = adapter
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit its base model .*missing adapter keys"):
        hf_sparse.load(folder)


def test_settings_that_cannot_work_are_reported_with_their_file(adapter):
    _, folder, _, _ = adapter
    for pattern, message in (
        ('{"name": "sliding_window", "options": {"window": 0}}', "holds no usable pattern: window must be"),
        ('{"name": "full"}, "layers": [99]', "does not fit: layers must hold indices"),
    ):
        (folder / "sparse_attention.json").write_text(f'{{"version": 1, "pattern": {pattern}}}')
        with pytest.raises(ValueError, match=f"adapter.sparse_attention.json {message}"):
            hf_sparse.load(folder)
