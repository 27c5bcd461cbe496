"""Training on a tiny random model: what is saved, what is refused, and what survives a kill."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import hf_sparse
from hf_sparse.hf import settings
from hf_sparse.train import SparseTrainingArguments, prepare, run

ROOT = Path(__file__).resolve().parents[2]


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_three_steps_save_an_adapter_that_loads_with_its_pattern(arguments, training):
    trainer = prepare(arguments(layers=[1]), training())
    folder = run(trainer)
    assert trainer.state.global_step == 3
    assert json.loads((folder / "sparse_attention.json").read_text())["pattern"] == {
        "name": "sliding_window",
        "options": {"window": 8},
    }
    saved = weights(folder)
    assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in saved.items())
    assert any(
        name.endswith("input_layernorm.weight") and (tensor != 1).any() for name, tensor in saved.items()
    )

    loaded = hf_sparse.load(folder)
    assert settings(loaded).pattern == hf_sparse.SlidingWindow(8)
    assert settings(loaded).layers == (1,)
    ids = torch.randint(4096, (2, 40))
    trained = trainer.model.eval()
    with torch.no_grad():
        want = trained(input_ids=ids).logits
        assert torch.equal(loaded.eval()(input_ids=ids).logits, want)
        with loaded.disable_adapter():
            assert not torch.equal(loaded(input_ids=ids).logits, want)


def test_the_dense_control_starts_equal_sees_the_same_samples_and_runs_full(arguments, training, tmp_path):
    sparse = prepare(arguments(), training(tmp_path / "a"))
    dense = prepare(arguments(dense_control=True), training(tmp_path / "b"))
    own, other = sparse.model.state_dict(), dense.model.state_dict()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert (sparse.train_dataset.ids == dense.train_dataset.ids).all()
    assert settings(dense.model).pattern == hf_sparse.get_pattern("full")
    assert settings(hf_sparse.load(run(dense))).pattern == hf_sparse.get_pattern("full")


def test_bf16_autocast_and_gradient_checkpointing_train_on_the_cpu(arguments, training):
    names = {field.name for field in dataclasses.fields(SparseTrainingArguments)}
    old, new = "gradient_checkpointing", "activation_checkpointing"  # as transformers calls it, by version
    trainer = prepare(arguments(), training(bf16=True, max_steps=2, **{new if new in names else old: True}))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    run(trainer)
    moved = [n for n, p in trainer.model.named_parameters() if n in before and not torch.equal(p, before[n])]
    assert {n for n in before if "lora_B" in n} <= set(moved)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 512}, "length=512 is beyond the 256 positions of LlamaForCausalLM"),
        ({"layers": [0, 7]}, "7"),
        ({"lora_targets": ["nothing"]}, "lora_targets names 'nothing'"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_before_anything_is_written(
    arguments, training, tmp_path, changes, message
):
    with pytest.raises(ValueError, match=message):
        prepare(arguments(**changes), training())
    assert not (tmp_path / "run").exists()


def test_a_missing_model_and_a_file_as_output_are_refused(arguments, training, tmp_path, text_files):
    wanted = arguments()
    wanted.model = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere; check the spelling"):
        prepare(wanted, training())
    with pytest.raises(ValueError, match=r"output_dir .* is a file"):
        prepare(arguments(), training(text_files[0]))


def test_a_text_without_text_is_refused(arguments, training, tmp_path, text_files):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    wanted = arguments()
    wanted.text = [*text_files, str(empty)]
    with pytest.raises(ValueError, match=r"empty\.txt holds no text; give a file with text in it"):
        prepare(wanted, training())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody may write in")
def test_an_output_folder_that_cannot_be_made_is_refused_before_the_model_is_read(arguments, training):
    wanted = arguments()
    wanted.model = "/nowhere"
    with pytest.raises(ValueError, match=r"output_dir /proc/zz cannot be written"):
        prepare(wanted, training("/proc/zz"))


def copied(base_folder, folder, model=None):
    """Return a copy of the base folder, with other weights where a model is given."""
    shutil.copytree(base_folder, folder)
    if model is not None:
        model.save_pretrained(folder)
    return folder


def refused(arguments, training, model):
    """Return the sentence that refuses a model; nothing may have been written."""
    wanted, settings = arguments(), training()
    wanted.model = str(model)
    with pytest.raises(ValueError) as caught:
        prepare(wanted, settings)
    assert not Path(settings.output_dir).exists() and "\n" not in str(caught.value)
    return str(caught.value)


def encoder_folder(base_folder, folder, model):
    """Return a model beside a tokenizer with the special tokens of an encoder."""
    copied(base_folder, folder, model)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.add_special_tokens({"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"})
    tokenizer.save_pretrained(folder)
    return folder


BERT = {"vocab_size": 4100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_an_encoder_learns_masked_words_under_its_pattern(arguments, training, base_folder, tmp_path):
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**BERT, intermediate_size=64, max_position_embeddings=96))
    wanted = arguments(
        lm_weight=1.0, pattern="longformer", pattern_options={"window": 8, "global_projections": True}
    )
    wanted.model = str(encoder_folder(base_folder, tmp_path / "bert", model))
    trainer = prepare(wanted, training(max_steps=4))
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("query_global.modules_to_save" in name for name in trained)
    assert any("output.dense.lora_A" in name for name in trained)
    assert not any("query_global.lora" in name for name in trained)
    folder = run(trainer)
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(entry["kl_loss"] + entry["lm_loss"], rel=1e-4)
    loaded = hf_sparse.load(folder).eval()
    ids = torch.randint(5, 4000, (2, 40))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


def test_training_goes_on_from_the_projections_the_base_was_saved_with(
    arguments, training, base_folder, tmp_path
):
    pattern = {"pattern": "longformer", "pattern_options": {"window": 8, "global_projections": True}}
    model = BertForMaskedLM(BertConfig(**BERT, intermediate_size=64, max_position_embeddings=96))
    hf_sparse.patch_model(model, "longformer", window=8, global_projections=True)
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.query_global.weight.fill_(0.25)
    wanted = arguments(**pattern)
    wanted.model = str(encoder_folder(base_folder, tmp_path / "bert", model))
    trained = dict(prepare(wanted, training()).model.named_parameters())
    (name,) = (n for n in trained if "layer.1" in n and "query_global.modules_to_save.default.weight" in n)
    assert (trained[name] == 0.25).all()


def test_an_encoder_without_a_head_for_masked_words_is_not_trained(
    arguments, training, base_folder, tmp_path
):
    config = BertConfig(**BERT, is_decoder=False)
    config.architectures = ["BertLMHeadModel"]
    folder = encoder_folder(base_folder, tmp_path / "bert", BertLMHeadModel(config))
    assert f"model={folder} is an encoder: BertLMHeadModel" in refused(arguments, training, folder)


def test_the_loss_is_logged_in_parts_with_the_window_as_it_narrows(arguments, training):
    wanted = arguments(
        kl_weight=0.5, lm_weight=0.25, attention_weight=0.125, narrow_from=64, narrow_share=0.6
    )
    trainer = prepare(wanted, training(max_steps=5))
    run(trainer)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.narrowing.windows == (64, 32, 16)
    assert [entry["window"] for entry in logs] == [64, 32, 16, 0, 0]
    for entry in logs:
        parts = 0.5 * entry["kl_loss"] + 0.25 * entry["lm_loss"] + 0.125 * entry["attention_loss"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-3)
    # every key of a sample is seen in the first step, and nothing has been learnt
    assert logs[0]["kl_loss"] == pytest.approx(0, abs=1e-6) and logs[-1]["kl_loss"] > 1e-5


def test_accumulated_batches_give_the_steps_of_one_large_batch(arguments, training, tmp_path):
    losses = []
    for size, times in ((4, 1), (1, 4)):
        settings = training(
            tmp_path / f"{size}",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=times,
            max_steps=4,
        )
        trainer = prepare(arguments(short="pad", lm_weight=0.5), settings)
        run(trainer)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 4


def test_a_base_with_missing_weights_is_not_trained(arguments, training, base_folder, tmp_path):
    folder = copied(base_folder, tmp_path / "base")
    kept = load_file(folder / "model.safetensors")
    del kept["model.layers.1.self_attn.q_proj.weight"]
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    text = refused(arguments, training, folder)
    assert "lacks 1 weights of LlamaForCausalLM, such as model.layers.1.self_attn.q_proj.weight" in text


def test_a_tokenizer_that_does_not_fit_is_refused(arguments, training, base_folder, tmp_path):
    config = LlamaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    folder = copied(base_folder, tmp_path / "small", LlamaForCausalLM(config))
    assert "but LlamaForCausalLM knows only 0 to 49" in refused(arguments, training, folder)
    (folder / "tokenizer.json").unlink()
    text = refused(arguments, training, folder)
    assert f"the tokenizer of {folder} cannot be loaded" in text and "save_pretrained" in text


def test_an_adapter_is_no_base_model(arguments, training, tmp_path):
    folder = run(prepare(arguments(), training(max_steps=1)))
    wanted = arguments()
    wanted.model = str(folder)
    with pytest.raises(ValueError, match="is an adapter"):
        prepare(wanted, training(tmp_path / "other"))
