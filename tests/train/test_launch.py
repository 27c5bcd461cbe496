"""Two processes train what one trains on the same samples: with DDP, FSDP2 and ZeRO-3, on the CPU."""

import dataclasses
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_process import run_case

from hf_sparse.train import SparseTrainingArguments, last_complete_checkpoint

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("training_process.py")
STEPS, ROWS = 4, 4  # rows: of a batch, over all processes


def launch(config, arguments, folder, **environment):
    """Run python with the arguments in two processes, as a configuration of recipes/accelerate says."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    command += ["--config_file", str(ROOT / "recipes/accelerate" / f"{config}.yaml")]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": paths, "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--num_cpu_threads_per_process", "1", *arguments],
        cwd=folder,
        env={**os.environ, **own, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    told = [line for line in done.stderr.splitlines() if line.startswith("[rank")]
    assert done.returncode == 0, "\n".join(told[-30:]) or done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def case(base_folder, tmp_path):
    """Make the case of a name, for so many processes, from texts of which many are shorter than a sample."""
    texts = []
    for i in range(30):
        lines = (f"def f{j}(x):\n    return x + {i * j}" for j in range(3 + i % 11))
        texts.append(tmp_path / f"{i}.txt")
        texts[-1].write_text("\n".join(lines), encoding="utf-8")

    def make(name, world, arguments=None, **training):
        return {
            "arguments": {
                "model": str(base_folder),
                "text": [str(text) for text in texts],
                "pattern_options": {"window": 8},
                "length": 64,
                "lora_r": 4,
                "kl_weight": 1.0,
                "lm_weight": 0.5,
                "short": "pack",
                **(arguments or {}),
            },
            "training": {
                "output_dir": str(tmp_path / f"{name}-{world}"),
                "max_steps": STEPS,
                "per_device_train_batch_size": ROWS // world,
                "gradient_accumulation_steps": 2,
                "learning_rate": 1e-2,
                "save_strategy": "no",
                "logging_steps": 1,
                "disable_tqdm": True,
                "use_cpu": True,
                "report_to": "none",
                "seed": 1,
                **training,
            },
        }

    return make


def run_both(cases, variants, config, tmp_path, **environment):
    """Run variants, name -> (arguments, training), in one process and, all in one go, in two."""
    for name, (arguments, training) in variants.items():
        run_case(cases(name, 1, arguments, **training))
    file = tmp_path / "cases.json"
    file.write_text(json.dumps([cases(name, 2, *rest[:1], **rest[1]) for name, rest in variants.items()]))
    return launch(config, [str(WORKER), str(file)], tmp_path, **environment)


def seen(tmp_path, name, world):
    return [json.loads((tmp_path / f"{name}-{world}/process-{i}.json").read_text()) for i in range(world)]


def adapter(folder):
    return load_file(folder / "adapter/adapter_model.safetensors")


def assert_same_training(tmp_path, name, engine=None, tolerance=1e-5):
    (one,), two = seen(tmp_path, name, 1), seen(tmp_path, name, 2)
    assert [process["world"] for process in two] == [2, 2]
    assert [process["engine"] for process in two] == [engine, engine]
    for whole, *shares in zip(one["rows"], *(process["rows"] for process in two), strict=True):
        assert all(len(share) == ROWS // 2 for share in shares)
        assert sorted(whole) == sorted(row for share in shares for row in share)
    for figure in ("loss", "kl_loss", "lm_loss", "grad_norm"):
        curve, other = ([step[figure] for step in run["log"] if figure in step] for run in (one, two[0]))
        assert len(curve) == STEPS
        assert other == pytest.approx(curve, rel=tolerance, abs=tolerance)
    ours, theirs = adapter(tmp_path / f"{name}-2"), adapter(tmp_path / f"{name}-1")
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[key], atol=tolerance, rtol=0, msg=lambda m, key=key: f"{key}: {m}"
        )
    assert any("lora_B" in key and tensor.abs().max() > 1e-3 for key, tensor in ours.items())


def test_two_processes_train_what_one_trains_and_either_goes_on_from_their_checkpoint(case, tmp_path):
    half = {"resume_from_checkpoint": str(tmp_path / "pack-2/checkpoint-2")}
    saved = {"save_strategy": "steps", "save_steps": 2}
    file = tmp_path / "cases.json"
    pad = {"short": "pad"}
    cases = [case("pack", 2, **saved), case("pad", 2, pad), case("half", 2, **half)]
    file.write_text(json.dumps(cases))
    printed = launch("multi_gpu", [str(WORKER), str(file)], tmp_path, ACCELERATE_USE_CPU="true")
    assert printed.count("'learning_rate'") == 2 * STEPS + 2  # each step is printed once
    run_case(case("pack", 1))
    run_case(case("pad", 1, pad))
    run_case(case("half", 1, **half))
    assert_same_training(tmp_path, "pack")
    assert_same_training(tmp_path, "pad")
    targets = [[sum(map(len, rows)) for rows in run["rows"]] for run in seen(tmp_path, "pad", 2)]
    assert (
        sum(a != b for a, b in zip(*targets, strict=True)) > STEPS
    )  # a mean of two means would be another one
    entire = adapter(tmp_path / "pack-2")
    for world, tolerance in ((1, 1e-5), (2, 0)):
        for key, tensor in adapter(tmp_path / f"half-{world}").items():
            torch.testing.assert_close(tensor, entire[key], atol=tolerance, rtol=0)


def test_the_recipe_in_two_processes_prints_and_writes_once(case, tmp_path):
    settings = case("recipe", 2, save_strategy="steps", save_steps=2)
    written = tmp_path / "recipe.yaml"
    written.write_text(json.dumps({**settings["arguments"], **settings["training"]}))  # JSON is YAML
    recipe = [str(ROOT / "recipes/finetune_lora.py"), "--config", str(written)]
    printed = launch("multi_gpu", recipe, tmp_path, ACCELERATE_USE_CPU="true")
    assert printed.count("trained  ") == printed.count("hf-sparse eval ") == 1
    checkpoint = last_complete_checkpoint(tmp_path / "recipe-2")
    assert checkpoint.name == "checkpoint-4"
    saved = load_file(checkpoint / "adapter_model.safetensors")
    assert all(torch.equal(tensor, saved[key]) for key, tensor in adapter(tmp_path / "recipe-2").items())


FIELDS = {field.name for field in dataclasses.fields(SparseTrainingArguments)}
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if name in FIELDS
)
SHARED_OUT = {
    "plain": ({}, {"save_strategy": "steps", "save_steps": 2}),
    "checkpointing": ({}, {CHECKPOINTING: True}),
    "narrowing": ({"narrow_from": 32}, {}),
    "pad": ({"short": "pad"}, {}),
}


@pytest.mark.slow
def test_fsdp2_trains_what_one_process_trains(case, tmp_path):
    run_both(case, SHARED_OUT, "fsdp2", tmp_path, ACCELERATE_USE_CPU="true")
    for name in SHARED_OUT:
        assert_same_training(tmp_path, name, engine="fsdp2")
    half = {"resume_from_checkpoint": str(tmp_path / "plain-2/checkpoint-2"), "trust_engine_state": True}
    low = ({"dtype": "bfloat16"}, {"bf16": True})
    file = tmp_path / "cases.json"
    file.write_text(json.dumps([case("half", 2, **half), case("bf16", 2, low[0], **low[1])]))
    launch("fsdp2", [str(WORKER), str(file)], tmp_path, ACCELERATE_USE_CPU="true")
    entire = adapter(tmp_path / "plain-2")
    for key, tensor in adapter(tmp_path / "half-2").items():
        torch.testing.assert_close(tensor, entire[key], atol=1e-5, rtol=0)
    run_case(case("bf16", 1, low[0], **low[1]))
    (one,), (two, _) = seen(tmp_path, "bf16", 1), seen(tmp_path, "bf16", 2)
    curve, other = ([step["loss"] for step in run["log"] if "loss" in step] for run in (one, two))
    assert other == pytest.approx(curve, rel=2**-8)  # bf16 keeps 8 bits


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero3_trains_what_one_process_trains(case, tmp_path):
    variants = {"plain": ({}, {}), "checkpointing": SHARED_OUT["checkpointing"]}
    own = {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    run_both(case, variants, "deepspeed_zero3", tmp_path, **own)
    for name in variants:
        assert_same_training(tmp_path, name, engine="deepspeed")
