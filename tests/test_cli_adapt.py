"""hf-sparse adapt: options become settings, a run becomes an adapter, mistakes are said in the command's own words."""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hf_sparse
from hf_sparse import SlidingWindow, Strided
from hf_sparse.cli import adapt as command_module
from hf_sparse.cli import main
from hf_sparse.hf import settings
from hf_sparse.train import AdaptationArguments

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path(argparse.__file__).read_text(encoding="utf-8")
QUICK = ["--length", "48", "--steps", "2", "--lora-r", "2", "--no-bf16", "--quiet"]


@pytest.fixture
def long_text(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(SOURCE[:3000], encoding="utf-8")
    return str(path)


@pytest.fixture
def command(tiny_model_folder, long_text, tmp_path):
    base = ["adapt", str(tiny_model_folder), "--text", long_text, *QUICK]
    return [*base, "--output", str(tmp_path / "run"), "--pattern"]


@pytest.fixture
def seen(monkeypatch):
    """Return a list that takes the settings of every run, which then ends before anything is loaded."""
    found = []

    def prepare(arguments, training):
        found.append((arguments, training))
        raise ValueError("that is all")

    monkeypatch.setattr("hf_sparse.train.prepare", prepare)
    return found


def test_from_a_model_to_an_adapter_that_eval_and_merge_take(command, long_text, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("import os")
    more = ["--window", "8", "--text", str(short), "--skip-shorter-than", "40", "--seed", "1"]
    assert main([*command, "sliding_window", *more]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert f"left out  1 document: {short} " in out
    adapter = tmp_path / "run" / "adapter"
    assert "pattern   sliding_window(window=8)" in out
    assert re.search(r"trained   [\d,]+ of [\d,]+ parameters", out)
    assert re.search(r"samples   \d+ of up to 48 tokens, [\d,]+ tokens in all", out)
    assert f"adapter   {adapter}\nevaluate  hf-sparse eval {adapter}\n" in out
    loaded = hf_sparse.load(adapter)
    assert settings(loaded).pattern == SlidingWindow(8) and loaded.peft_config["default"].r == 2
    assert main(["eval", str(adapter), "--text", long_text, "--length", "48", "--quiet"]) == 0
    assert main(["merge", str(adapter), "--output", str(tmp_path / "merged")]) == 0
    assert settings(hf_sparse.load(tmp_path / "merged")).pattern == SlidingWindow(8)


def test_a_run_goes_on_from_its_checkpoint(command, tmp_path, capsys):
    every = ["sliding_window", "--window", "8", "--save-every", "1"]
    assert main([*command, *every]) == 0
    run, weights = tmp_path / "run", "adapter_model.safetensors"
    finished = load_file(run / "adapter" / weights)
    for lost in ("checkpoint-2", "adapter"):  # as if it had been stopped after the first step
        shutil.rmtree(run / lost)
    assert main([*command, *every, "--resume"]) == 0, capsys.readouterr().err
    assert f"resuming  {run / 'checkpoint-1'}" in capsys.readouterr().out
    again = load_file(run / "adapter" / weights)
    assert all(torch.equal(again[name], finished[name]) for name in finished)
    assert main([*command, *every, "--resume", "--lora-r", "4"]) == 2
    err = capsys.readouterr().err
    assert "--lora-r 2, not 4" in err and "give another --output" in err


def test_who_interrupts_it_is_told_how_to_go_on(command, tmp_path, capsys, monkeypatch):
    def interrupted(_trainer):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_sparse.train.run", interrupted)
    assert main([*command, "sliding_window", "--window", "8"]) == 130
    assert f"with --resume to go on from the last checkpoint in {tmp_path / 'run'}" in capsys.readouterr().err


def test_who_runs_out_of_space_is_told_how_to_go_on(command, tmp_path, capsys, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_sparse.train.checkpoints.trainer.write_manifest", full)
    assert main([*command, "sliding_window", "--window", "8", "--save-every", "1"]) == 2
    err = capsys.readouterr().err
    assert "checkpoint-1 cannot be written (" in err and "make room, then go on with --resume" in err, err
    assert "resume_from_checkpoint" not in err


def test_every_spelling_of_a_pattern_arrives(command, seen, tmp_path):
    file = tmp_path / "heads.json"
    apart = SlidingWindow(4) | Strided(3)
    hf_sparse.save_pattern(apart, file)
    for written, pattern in (
        (["sliding_window", "--window", "8"], SlidingWindow(8)),
        (["sliding_window|strided", "--window", "8", "--stride", "5"], SlidingWindow(8) | Strided(5)),
        (["longformer|sliding_window", "--window", "6"], hf_sparse.Longformer(6) | SlidingWindow(6)),
        (["longformer", "--global-tokens", "0,3"], hf_sparse.Longformer(global_tokens=(0, 3))),
        ([str(file)], apart),
    ):
        assert main([*command, *written]) == 2
        chosen = seen.pop()[0].chosen_pattern()
        assert getattr(chosen, "pattern", chosen) == pattern


def test_options_become_settings_and_may_come_from_a_file(command, seen, tmp_path):
    config = tmp_path / "adapt.yaml"
    config.write_text(
        "pattern: sliding_window\nwindow: 8\nlr: 3e-4\nkl-weight: 0.5\nlm_weight: 1\ntrain-norms: false\n"
        "lora-targets: [q_proj, v_proj]\nnarrow-from: 32\neval-text: [a.txt]\neval-every: 7\nsteps: 9\nlayers: [1]\n"
        "gradient-checkpointing: true\ndense-control: true\n"
    )
    own = [
        "--accumulate",
        "3",
        "--batch-size",
        "4",
        "--seed",
        "5",
        "--warmup",
        "0",
        "--keep",
        "1",
        "--resume",
    ]
    assert main([*command[:-1], "--config", str(config), *own, "--lr-schedule", "linear"]) == 2
    arguments, training = seen[0]
    changed = {
        "kl_weight": 0.5,
        "lm_weight": 1.0,
        "train_norms": False,
        "lora_targets": ["q_proj", "v_proj"],
        "narrow_from": 32,
        "eval_text": ["a.txt"],
        "layers": [1],
        "dense_control": True,
        "length": 48,
        "lora_r": 2,
    }
    defaults = AdaptationArguments().as_json()
    for name in ("model", "text", "pattern_options"):
        changed[name] = getattr(arguments, name)
    assert arguments.as_json() == {**defaults, **changed}
    assert arguments.pattern_options == {"window": 8}
    wanted = {
        "max_steps": 2,  # the command line wins
        "learning_rate": 3e-4,
        "gradient_accumulation_steps": 3,
        "per_device_train_batch_size": 4,
        "seed": 5,
        "warmup_steps": 0,
        "save_total_limit": 1,
        "resume_from_checkpoint": "auto",
        "eval_steps": 7,
        "bf16": False,
        "gradient_checkpointing": True,
        "push_to_hub": False,
    }
    assert {name: getattr(training, name) for name in wanted} == wanted
    assert training.eval_strategy == "steps" and training.lr_scheduler_type == "linear"


def test_every_setting_of_an_adaptation_has_an_option(command):
    parser = argparse.ArgumentParser()
    command_module.add_arguments(parser)
    own = {action.dest for action in parser._actions}
    settings = set(AdaptationArguments.__dataclass_fields__)
    assert settings - own == {"plugin", "pattern_options"}, (
        "--plugin and the patterns' options stand for these"
    )
    help = {action.dest: action.help for action in parser._actions}
    assert "(default 16)" in help["lora_r"] and "(default yes)" in help["train_norms"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["sliding_windo"], r"unknown pattern 'sliding_windo'\. Did you mean 'sliding_window'"),
        (["sliding_window", "--stride", "3"], r"sliding_window has no option --stride"),
        (["sliding_window", "--lr", "0"], r"--lr must be above 0, got 0\.0"),
        (["sliding_window", "--steps", "0"], r"--steps must be >= 1, got 0"),
        (["sliding_window", "--warmup", "-1"], r"--warmup must be >= 0 and below the 2 of --steps, got -1"),
        (["sliding_window", "--warmup", "2"], r"--warmup must be >= 0 and below the 2 of --steps, got 2"),
        (["sliding_window", "--weight-decay", "nan"], r"--weight-decay must be at least 0, got nan"),
        (
            ["sliding_window", "--hub-model-id", "a/b"],
            r"--hub-model-id goes with --push-to-hub, which is not given",
        ),
        (["sliding_window", "--eval-length", "9"], r"--eval-length goes with --eval-every"),
        (["sliding_window", "--eval-documents", "9"], r"--eval-documents goes with --eval-every"),
        (["sliding_window", "--narrow-share", "0.1"], r"--narrow-share goes with --narrow-from"),
        (["sliding_window", "--encoding-errors", "x"], r"--encoding-errors must be one of strict"),
        (["sliding_window", "--push-to-hub"], r"--push-to-hub would publish .* without --push-to-hub"),
        (["sliding_window", "--batch-size", "0"], r"--batch-size must be a whole number >= 1, got 0"),
        (
            ["sliding_window", "--kl-weight", "0"],
            r"--kl-weight, --lm-weight and --attention-weight are all 0",
        ),
        (["sliding_window", "--lora-r", "0"], r"--lora-r must be a whole number >= 1, got 0"),
        (["sliding_window", "--dtype", "int8"], r"--dtype must be float32, bfloat16 or float16, got 'int8'"),
        (["sliding_window", "--dataset", "a"], r"--text and --dataset both say what to read"),
        (["sliding_window", "--split", "a"], r"--split goes with --dataset, and there is none"),
        (["sliding_window", "--length", "9999"], r"--length 9999 is beyond the 512 positions"),
        (["sliding_window", "--window", "8", "--lora-targets", "nothing"], r"--lora-targets names 'nothing'"),
        (["sliding_window", "--eval-text", "a.txt"], r"--eval-text would never be read; .* --eval-every N"),
        (["sliding_window", "--eval-every", "3"], r"--eval-every 3 needs texts .* with --eval-text"),
        (
            ["layered"],
            r"layered\(pattern=sliding_window\(window=512\), dense_every=4\) leaves nothing out",
        ),
        (
            ["sliding_window", "--report-to", "wadnb"],
            r"--report-to wadnb is not installed here or not known .* none",
        ),
    ],
)
def test_mistakes_name_the_options_and_write_nothing(command, tmp_path, capsys, more, message):
    assert main([*command, *more]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and re.search(message, err), err
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_there_is_named_as_the_argument(command, tmp_path, capsys, adapter_folder):
    command[1] = str(adapter_folder)
    assert main([*command, "full"]) == 2
    assert re.search(r"MODEL .*adapter is an adapter", capsys.readouterr().err)


@pytest.mark.slow
def test_two_processes_train_one_adapter_and_one_of_them_speaks(command, tmp_path):
    arguments = [*command, "sliding_window", "--window", "8"]
    launched = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [*launched, "-m", "hf_sparse.cli", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("adapter   ") == 1 and done.stdout.count("trained   ") == 1
    assert settings(hf_sparse.load(tmp_path / "run" / "adapter")).pattern == SlidingWindow(8)
