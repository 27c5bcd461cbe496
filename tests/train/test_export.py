"""Merged models: the same logits, a folder that is whole, and nothing lost on the way."""

import json
import shutil
import stat

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import hf_sparse
from hf_sparse import Longformer, SlidingWindow, StreamingLLM, Strided
from hf_sparse.hf import settings
from hf_sparse.hf.extension import extend_positions, extension_of
from hf_sparse.train.export import merge

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    # one case trains embeddings apart from the head they are tied to
    pytest.mark.filterwarnings("ignore:.*`ensure_weight_tying` is not set to True:UserWarning"),
]

SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 2,
}
GLOBALS = ["query_global", "key_global", "value_global"]
APART = Longformer(window=3, global_tokens=(0, 5), global_projections=True)
IDS = torch.arange(3, 43)[None] * 7 % 400


def llama(tied=False):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied))


def gpt2():
    config = transformers.GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    return transformers.GPT2LMHeadModel(config)


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture
def adapter(tmp_path, tiny_tokenizer):
    """Return a function that saves a base and a trained adapter of it; gives the adapter's folder and logits."""

    def make(base, pattern, task="CAUSAL_LM", extended=None, **lora):
        torch.manual_seed(0)
        folder = tmp_path / "base"
        model = base()
        with torch.no_grad():  # the default 0.02 makes attention nearly uniform: patterns would hardly show
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.2)
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        model = type(model).from_pretrained(folder)
        if extended is not None:
            extend_positions(model, extended, "linear")
        hf_sparse.patch_model(model, pattern)
        trained = get_peft_model(model, LoraConfig(task_type=task, **{"r": 2, **lora}))
        with torch.no_grad():
            for parameter in trained.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
        hf_sparse.save_adapter(trained, tmp_path / "adapter")
        return tmp_path / "adapter", logits(trained)

    return make


LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
CASES = {
    "tied-with-norms": (
        lambda: llama(tied=True),
        SlidingWindow(4) | Strided(3),
        {**LLAMA, "modules_to_save": ["input_layernorm", "norm"]},
    ),
    "dora-rslora": (llama, StreamingLLM(1, 5), {**LLAMA, "use_dora": True, "use_rslora": True, "r": 4}),
    "embeddings-tied": (
        lambda: llama(tied=True),
        SlidingWindow(4),
        {**LLAMA, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "embeddings-untied": (
        lambda: llama(tied=True),
        SlidingWindow(4),
        {**LLAMA, "modules_to_save": ["embed_tokens"]},
    ),
    "conv1d": (gpt2, SlidingWindow(4), {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "encoder": (
        bert,
        APART,
        {"task": None, "target_modules": ["query", "value"], "modules_to_save": GLOBALS},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_gives_the_adapters_logits_under_its_pattern(case, adapter, tmp_path):
    base, pattern, lora = CASES[case]
    folder, want = adapter(base, pattern, **lora)
    output = merge(folder, tmp_path / "new" / "merged")
    loaded = hf_sparse.load(output)
    assert not hasattr(loaded, "peft_config") and settings(loaded).pattern == pattern
    torch.testing.assert_close(logits(loaded), want, atol=1e-5, rtol=1e-5)
    untrained = hf_sparse.patch_model(type(loaded).from_pretrained(tmp_path / "base"), pattern)
    assert (logits(untrained) - want).abs().max() > 1e-2
    if case != "encoder":  # global projections need hf_sparse.load
        name = hf_sparse.hf.attention_name(pattern)
        plain = transformers.AutoModelForCausalLM.from_pretrained(output, attn_implementation=name)
        assert torch.equal(logits(plain), logits(loaded))
        dense = transformers.AutoModelForCausalLM.from_pretrained(output)
        assert (logits(dense) - want).abs().max() > 1e-2


def test_a_base_that_was_made_to_read_more_stays_so(adapter, tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "model_max_length", 128)
    folder, want = adapter(llama, SlidingWindow(4), extended=512, **LLAMA)
    output = merge(folder, tmp_path / "merged")
    torch.testing.assert_close(logits(hf_sparse.load(output)), want, atol=1e-5, rtol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "base").model_max_length == 128
    assert transformers.AutoTokenizer.from_pretrained(output).model_max_length == 512
    assert extension_of(hf_sparse.load(output)).length == 512


def test_the_folder_is_whole(adapter, tmp_path, tiny_tokenizer):
    folder, _ = adapter(llama, SlidingWindow(4), **LLAMA)
    config = json.loads((tmp_path / "base" / "generation_config.json").read_text())
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({**config, "top_k": 7}))
    output = merge(folder, tmp_path / "merged", dtype=torch.bfloat16)
    assert {path.suffix for path in output.iterdir()} == {".json", ".safetensors", ".md"}
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(output / "model.safetensors").values())
    text = "def f(x):\n    return x"
    assert transformers.AutoTokenizer.from_pretrained(output)(text) == tiny_tokenizer(text)
    assert transformers.GenerationConfig.from_pretrained(output).top_k == 7
    assert stat.S_IMODE(output.stat().st_mode) == stat.S_IMODE((tmp_path / "base").stat().st_mode)
    assert len({stat.S_IMODE(path.stat().st_mode) for path in output.iterdir()}) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]
    card = ModelCard.load(output / "README.md")
    assert card.data.library_name == "transformers" and card.data.base_model is None
    assert 'attn_implementation="sparse_sliding_window"' in card.text and str(tmp_path) not in card.content


def test_a_model_is_replaced_only_when_asked_and_as_a_whole(adapter, tmp_path, monkeypatch):
    folder, want = adapter(llama, SlidingWindow(4), **LLAMA)
    output = merge(folder, tmp_path / "merged")
    (output / "old.txt").write_text("old")
    with pytest.raises(ValueError, match="merged exists; name another one"):
        merge(folder, output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}

    def stops(*_args, **_kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", stops)
        with pytest.raises(
            ValueError, match=r"cannot be written to .*merged \(.*No space left .*\); make room"
        ):
            merge(folder, output, overwrite=True)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert merge(folder, output, overwrite=True) == output and not (output / "old.txt").exists()
    torch.testing.assert_close(logits(hf_sparse.load(output)), want, atol=1e-5, rtol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]


def test_where_a_merged_model_may_not_go(adapter, tmp_path, monkeypatch):
    folder, _ = adapter(llama, SlidingWindow(4), **LLAMA)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    for output, message in (
        (folder / "merged", "and the adapter, .*, lie in one another; name a folder beside it"),
        (folder, "and the adapter"),
        (tmp_path, "and the adapter"),
        (tmp_path / "base", "and its base model"),
        (folder / "adapter_config.json", "is a file; name a folder"),
        (other, "other holds no config.json, so it is no model to be replaced"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(folder, output, overwrite=True)
    assert (other / "mine.txt").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(ValueError, match=r"the merged model takes 0 MiB and .* has 0 MiB left; make room"):
        merge(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_is_no_adapter_with_a_pattern_or_cannot_be_merged_is_refused(adapter, tmp_path, monkeypatch):
    folder, _ = adapter(llama, SlidingWindow(4), **LLAMA)
    output = tmp_path / "merged"
    for wrong in (tmp_path / "base", tmp_path / "nowhere"):
        with pytest.raises(
            ValueError, match=f"{wrong.name} is no adapter folder: it holds no adapter_config.json"
        ):
            merge(wrong, output)
    prompts = tmp_path / "prompts"
    model = hf_sparse.patch_model(llama(), SlidingWindow(4))
    model.name_or_path = str(tmp_path / "base")
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    hf_sparse.save_adapter(tuned, prompts)
    with pytest.raises(
        ValueError, match="prompts is of the type PROMPT_TUNING, which has no weights to merge"
    ):
        merge(prompts, output)

    def quantised(_self):
        raise ValueError("Cannot merge LORA layers when the model is gptq quantized")

    with monkeypatch.context() as patch:
        patch.setattr("peft.tuners.lora.LoraModel._check_merge_allowed", quantised)
        with pytest.raises(ValueError, match=r"adapter cannot be merged .*gptq quantized\); use it as it is"):
            merge(folder, output)
    weights = load_file(folder / "adapter_model.safetensors")
    broken = {name: tensor * float("nan") for name, tensor in weights.items()}
    save_file(broken, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot be merged into its base \(NaNs detected"):
        merge(folder, output)
    (folder / "sparse_attention.json").unlink()
    with pytest.raises(ValueError, match=r"has no sparse_attention\.json, so its pattern is unknown"):
        merge(folder, output)
    assert not output.exists()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_change_to_one_of_two_tied_weights_is_not_merged_into_both(target, adapter, tmp_path):
    folder, want = adapter(lambda: llama(tied=True), SlidingWindow(4), target_modules=["q_proj", target])
    torch.testing.assert_close(logits(hf_sparse.load(folder)), want)
    with pytest.raises(
        ValueError, match="changes one of the embeddings and the head of LlamaForCausalLM, which share"
    ):
        merge(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_whose_base_is_gone_says_so(adapter, tmp_path):
    folder, _ = adapter(llama, SlidingWindow(4), **LLAMA)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"the base model of adapter .* cannot be found: there is no folder .*base"
    ):
        merge(folder, tmp_path / "merged")
