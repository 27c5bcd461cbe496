"""Adapters of extended models: the base is extended and patched again before they go on, or they are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import logits, random_model, tiny, tokens
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import hf_sparse
from hf_sparse import extend_positions, load_adapter, patch_model
from hf_sparse.hf import position_tables, settings
from hf_sparse.hf.extension import Extension, extension_of

# peft still asks for the old name of what transformers now calls activation checkpointing
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

LENGTH = 300
TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "opt": ["q_proj"],
    "bert": ["query"],
    "roberta": ["query"],
}
WINDOW = hf_sparse.SlidingWindow(window=6)


def base_model(folder):
    masked = json.loads((folder / "config.json").read_text())["model_type"] in ("bert", "roberta")
    return (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_pretrained(folder).eval()


def trained(name, folder, method=None, pattern=WINDOW, train_positions=False):
    """Save a base and an adapter on it, extended or not, to two folders; return them and the adapted model's logits."""
    from peft import LoraConfig, get_peft_model

    tiny(name).save_pretrained(folder / "base")
    model = base_model(folder / "base")
    if method is not None:
        extend_positions(model, LENGTH, method)
    patch_model(model, pattern)
    tables = position_tables(model) if train_positions else None
    config = LoraConfig(r=2, target_modules=TARGETS[name], modules_to_save=tables, init_lora_weights=False)
    if name in ("llama", "gpt2", "opt"):
        config.task_type = "CAUSAL_LM"
    config.fan_in_fan_out = name == "gpt2"
    torch.manual_seed(0)
    adapted = get_peft_model(model, config).eval()
    if tables:
        with torch.no_grad():
            for key, weight in adapted.named_parameters():
                if "modules_to_save" in key:
                    weight.normal_(0.0, 0.3)
    hf_sparse.save_adapter(adapted, folder / "adapter")
    return folder / "base", folder / "adapter", logits(adapted, tokens(1, LENGTH if method else 100))


@pytest.mark.parametrize(
    ("name", "method", "train_positions"),
    [
        ("llama", "linear", False),
        ("llama", "yarn", False),
        ("gpt2", "copy", True),
        ("opt", "copy", True),
        ("bert", "copy", True),
        ("roberta", "copy", True),
        ("gpt2", "copy", False),
    ],
)
def test_load_extends_patches_and_adapts(name, method, train_positions, tmp_path):
    _, folder, expected = trained(name, tmp_path, method, train_positions=train_positions)
    stored = json.loads((folder / "sparse_attention.json").read_text())
    assert stored["extension"] == {"method": method, "length": LENGTH}
    model = hf_sparse.load(folder)
    assert torch.equal(logits(model, tokens(1, LENGTH)), expected)
    assert extension_of(model) == Extension(method, LENGTH) and settings(model).pattern == WINDOW


def test_an_adapter_of_a_base_that_was_saved_extended_loads(tmp_path):
    _, folder, expected = trained("gpt2", tmp_path, "copy")
    extended = extend_positions(base_model(tmp_path / "base"), LENGTH, "copy")
    extended.save_pretrained(tmp_path / "base")
    assert torch.equal(logits(hf_sparse.load(folder), tokens(1, LENGTH)), expected)


def test_an_adapter_without_extension_loads_as_before_and_not_on_an_extended_base(tmp_path):
    base, folder, expected = trained("llama", tmp_path)
    assert "extension" not in json.loads((folder / "sparse_attention.json").read_text())
    assert torch.equal(logits(hf_sparse.load(folder), tokens(1, 100)), expected)
    extend_positions(base_model(base), LENGTH, "ntk").save_pretrained(base)
    with pytest.raises(
        ValueError, match=r"with its own positions, and this \w+ is extended to 300 tokens by 'ntk'"
    ):
        hf_sparse.load(folder)


@pytest.mark.parametrize(
    ("extension", "message"),
    [
        (
            {"method": "copy", "length": 300},
            r"saved in .*sparse_attention\.json does not fit: .* cannot extend",
        ),
        ({"method": "linear", "length": 100}, "does not fit: .* reads 128 tokens already"),
        ({"method": "linear"}, "holds no usable extension of positions, got {'method': 'linear'}"),
        ("linear", "holds no usable extension of positions, got linear"),
    ],
)
def test_an_extension_that_cannot_be_is_reported_with_its_file(extension, message, tmp_path):
    _, folder, _ = trained("llama", tmp_path, "linear")
    sidecar = folder / "sparse_attention.json"
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "extension": extension}))
    with pytest.raises(ValueError, match=message):
        hf_sparse.load(folder)
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "extension": None, "other": 1}))
    with pytest.raises(ValueError, match=r"has unknown keys \['other'\]"):
        hf_sparse.load(folder)


def test_an_extension_is_no_part_of_a_whole_models_pattern(tmp_path):
    model = patch_model(extend_positions(tiny("llama"), LENGTH, "yarn"), WINDOW)
    assert "extension" not in model.config.sparse_attention


@pytest.mark.parametrize(("name", "method"), [("llama", None), ("llama", "yarn"), ("roberta", "copy")])
def test_an_adapter_goes_on_a_model_in_memory(name, method, tmp_path):
    base, folder, expected = trained(name, tmp_path, method, train_positions=name == "roberta")
    ids = tokens(1, LENGTH if method else 100)
    for patched in (False, True):
        model = base_model(base)
        if method is not None:
            extend_positions(model, LENGTH, method)
        if patched:
            patch_model(model, WINDOW, backend="reference")  # how it is computed is the caller's choice
        adapted = load_adapter(model, folder)
        torch.testing.assert_close(logits(adapted, ids), expected, atol=1e-4 if patched else 0, rtol=0)
        assert settings(adapted).pattern == WINDOW and not any(p.requires_grad for p in adapted.parameters())
        assert settings(adapted).backend == ("reference" if patched else "auto")
    adapted = load_adapter(
        extend_positions(base_model(base), LENGTH, method) if method else base_model(base),
        folder,
        is_trainable=True,
    )
    assert any(p.requires_grad for p in adapted.parameters())


def test_a_model_that_runs_another_pattern_is_refused(tmp_path):
    base, folder, _ = trained("llama", tmp_path)
    for pattern, layers, said in (
        ("strided", None, r"sliding_window\(window=6\), and LlamaForCausalLM runs strided"),
        (
            WINDOW,
            [1],
            r"sliding_window\(window=6\), and LlamaForCausalLM runs sliding_window\(window=6\) in layers",
        ),
    ):
        model = patch_model(base_model(base), pattern, layers=layers)
        before = settings(model)
        with pytest.raises(ValueError, match=said + r".*; call hf_sparse\.unpatch_model\(model\) first"):
            load_adapter(model, folder)
        assert settings(model) == before and not any("lora" in name for name, _ in model.named_parameters())


def test_a_model_that_is_extended_otherwise_is_refused(tmp_path):
    base, folder, _ = trained("llama", tmp_path, "linear")
    model = base_model(base)
    with pytest.raises(ValueError, match=r"call hf_sparse\.extend_positions\(model, 300, 'linear'\) first"):
        load_adapter(model, folder)
    assert settings(model) is None and extension_of(model) is None
    with pytest.raises(
        ValueError, match=r"300 tokens by 'linear', and this .* 256 tokens by 'yarn'; load the base as"
    ):
        load_adapter(extend_positions(model, 256, "yarn"), folder)


def test_an_adapter_of_another_base_is_refused(tmp_path):
    _, folder, _ = trained("llama", tmp_path)
    narrow = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2}
    model = random_model("LlamaForCausalLM", {**narrow, "num_attention_heads": 4})
    said = r"trained on .*base \(llama with 2 layers of width 32\), and this model is llama with 2 layers of width 16"
    with pytest.raises(ValueError, match=said):
        load_adapter(model, folder)
    with pytest.raises(ValueError, match="and this model is gpt2 with 2 layers of width 32"):
        load_adapter(tiny("gpt2"), folder)
    # where the base is not at hand, the adapter's own weights tell
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "org/llama"}))
    gpt2 = tiny("gpt2")
    with pytest.raises(
        ValueError, match=r"on org/llama and has the weight model\.layers\.0\..*GPT2LMHeadModel has no"
    ):
        load_adapter(gpt2, folder)
    assert settings(gpt2) is None
    with pytest.raises(
        ValueError, match=r"trained on org/llama does not fit LlamaForCausalLM \(.*size mismatch"
    ):
        load_adapter(model, folder)
    shallow = random_model(
        "LlamaForCausalLM",
        {
            **narrow,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 1,
        },
    )
    with pytest.raises(ValueError, match=r"has the weight model\.layers\.1\."):
        load_adapter(shallow, folder)


def test_weights_without_a_place_are_not_dropped_and_all_kinds_of_weights_have_one(tmp_path):
    _, folder, _ = trained("llama", tmp_path)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    key = next(iter(weights))
    save_file({**weights, key.replace(".layers.0.", ".layers.7."): weights[key].clone()}, file)
    with pytest.raises(
        ValueError, match=r"has the weight model\.layers\.7\.\S+, for which LlamaForCausalLM has no"
    ):
        hf_sparse.load(folder)


def test_other_kinds_of_adapters_go_on_too(tmp_path):
    from peft import LoraConfig, OFTConfig, VeraConfig, get_peft_model

    tiny("llama").save_pretrained(tmp_path / "base")
    own = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    for config in (
        OFTConfig(**own, oft_block_size=4, use_cayley_neumann=False),
        VeraConfig(**own, r=2),
        LoraConfig(**own, r=2, trainable_token_indices=[3]),
    ):
        model = get_peft_model(patch_model(base_model(tmp_path / "base"), WINDOW), config)
        folder = tmp_path / config.peft_type.value
        hf_sparse.save_adapter(model, folder)
        for loaded in (hf_sparse.load(folder), load_adapter(base_model(tmp_path / "base"), folder)):
            assert torch.equal(logits(loaded.eval(), tokens(1, 30)), logits(model.eval(), tokens(1, 30)))


def test_the_active_adapter_is_saved_whatever_its_name(tmp_path):
    from peft import PeftModel

    base, folder, expected = trained("llama", tmp_path)
    model = PeftModel.from_pretrained(patch_model(base_model(base), WINDOW), folder, adapter_name="mine")
    model.add_adapter("other", model.peft_config["mine"])
    hf_sparse.save_adapter(model, tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == {path.name for path in folder.iterdir()}
    assert torch.equal(logits(hf_sparse.load(tmp_path / "again"), tokens(1, 100)), expected)


def test_a_folder_or_model_that_cannot_be_used_is_refused(tmp_path):
    base, folder, _ = trained("llama", tmp_path)
    model = load_adapter(base_model(base), folder)
    with pytest.raises(ValueError, match="has an adapter already"):
        load_adapter(model, folder)
    with pytest.raises(ValueError, match=r"holds no adapter_config\.json"):
        load_adapter(base_model(base), base)
    (folder / "sparse_attention.json").unlink()
    with pytest.raises(ValueError, match=r"has no sparse_attention\.json, so its pattern is unknown"):
        load_adapter(base_model(base), folder)


def test_commands_extend_the_base_too(tmp_path, tiny_tokenizer):
    import argparse

    from hf_sparse.cli.models import load_model

    base, folder, expected = trained("llama", tmp_path, "linear")
    tiny_tokenizer.save_pretrained(base)
    given = {"pattern": None, "dtype": "auto", "device": "cpu", "adapter": None, "control": None}
    model, _ = load_model(argparse.Namespace(model=str(folder), **given))
    assert torch.equal(logits(model, tokens(1, LENGTH)), expected)
    (tmp_path / "other").mkdir()
    _, control, _ = trained("llama", tmp_path / "other", "yarn", pattern=hf_sparse.Full())
    with pytest.raises(
        ValueError, match="by 'yarn', and this PeftModelForCausalLM is extended to 300 tokens by 'linear'"
    ):
        load_model(argparse.Namespace(model=str(folder), **{**given, "control": str(control)}))
