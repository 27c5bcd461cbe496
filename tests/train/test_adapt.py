"""Training on a tiny random model: what is saved, what is refused, and what survives a kill."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

import hf_sparse
from hf_sparse.hf import settings
from hf_sparse.train import SparseTrainingArguments, last_complete_checkpoint, prepare, run

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
    assert list(sparse.train_dataset["input_ids"]) == list(dense.train_dataset["input_ids"])
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


def test_an_encoder_is_not_trained(arguments, training, base_folder, tmp_path):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=4096, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    folder = copied(base_folder, tmp_path / "bert", BertForMaskedLM(config))
    assert f"model={folder} is an encoder: BertLMHeadModel" in refused(arguments, training, folder)


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


KILLED = """
import json, os, signal, sys
from transformers import TrainerCallback
from hf_sparse.train import AdaptationArguments, SparseTrainingArguments, prepare, run

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

arguments, training = (json.loads(text) for text in sys.argv[1:])
trainer = prepare(AdaptationArguments(**arguments), SparseTrainingArguments(**training))
trainer.add_callback(Kill())
run(trainer)
"""


def test_a_killed_run_leaves_no_adapter_and_resumes_to_the_same_weights(arguments, training, tmp_path):
    steps = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    straight = run(prepare(arguments(), training(tmp_path / "straight", **steps)))
    kept = sorted(path.name for path in (tmp_path / "straight").glob("checkpoint-*"))
    assert kept == ["checkpoint-5"], "the limit of one checkpoint was not kept"
    checkpoint = tmp_path / "straight" / "checkpoint-5"
    assert_same_weights(weights(checkpoint), weights(straight))
    assert json.loads((checkpoint / "sparse_attention.json").read_text()) == json.loads(
        (straight / "sparse_attention.json").read_text()
    )

    output = tmp_path / "killed"
    written = {
        "output_dir": str(output),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
        "seed": 1,
        **steps,
    }
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(arguments().as_json()), json.dumps(written)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in output.iterdir()] == ["checkpoint-2"], "something half-written is left"

    torn = output / "checkpoint-3"  # as if the kill had come while it was written
    shutil.copytree(output / "checkpoint-2", torn)
    os.truncate(torn / "optimizer.pt", 100)
    resumed = prepare(arguments(), training(output, resume_from_checkpoint="auto", **steps))
    assert Path(resumed.args.resume_from_checkpoint).name == "checkpoint-2"
    assert_same_weights(weights(run(resumed)), weights(straight))


def test_checkpoints_say_what_is_wrong_with_them(arguments, training, caplog):
    steps = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    output = run(prepare(arguments(), training(**steps))).parent
    newest, older = output / "checkpoint-2", output / "checkpoint-1"
    assert last_complete_checkpoint(output) == newest
    intact = {path.name: path.read_bytes() for path in newest.iterdir()}
    for name in set(intact) - {"complete.json"}:
        (newest / name).write_bytes(intact[name][:-1])
        assert last_complete_checkpoint(output) == older
        assert f"{name} has {len(intact[name]) - 1} bytes instead of {len(intact[name])}" in caplog.text
        (newest / name).unlink()
        assert last_complete_checkpoint(output) == older
        assert f"{name} is missing" in caplog.text
        (newest / name).write_bytes(intact[name])
    (newest / "complete.json").unlink()
    assert last_complete_checkpoint(output) == older
    with pytest.raises(
        ValueError, match=r"cannot resume from .*checkpoint-2: it has no readable complete.json"
    ):
        prepare(arguments(), training(resume_from_checkpoint=str(newest), **steps))
    with pytest.raises(ValueError, match="was trained with lora_r=4, not 2; give another --output_dir"):
        prepare(arguments(lora_r=2), training(resume_from_checkpoint="auto", **steps))
    for changes, named in (
        ({"seed": 2}, "seed=1, not 2"),
        (
            {"gradient_accumulation_steps": 2},
            "batch size * gradient_accumulation_steps * processes=2, not 4",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(f"was trained with {named}; give another")):
            prepare(arguments(), training(resume_from_checkpoint="auto", **steps, **changes))


@pytest.mark.parametrize(
    "manifest",
    [
        '{"files": {}}',
        '{"files": []}',
        '{"files": {}, "trained_with": null}',
        '{"files": {"a": 1}, "trained_with": null}',
        '{"files": 1, "trained_with": {}}',
        "[]",
    ],
)
def test_a_manifest_that_says_nothing_is_passed_over(tmp_path, manifest, caplog):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "complete.json").write_text(manifest)
    (tmp_path / "checkpoint-1" / "a").write_text("x")
    assert last_complete_checkpoint(tmp_path) is None
    assert "passing over checkpoint" in caplog.text and "complete.json" in caplog.text
