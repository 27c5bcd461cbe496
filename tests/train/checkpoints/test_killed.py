"""A training process killed at any moment and started again ends with the bits of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_sparse.train import AdaptationArguments, SparseTrainingArguments, prepare, run
from hf_sparse.train.checkpoints import find_flaw

from .runs import adapter, names, same

STEPS = 40
ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import json, os, signal, sys
from transformers import TrainerCallback
from hf_sparse.train import AdaptationArguments, SparseTrainingArguments, prepare, run

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

arguments, training, kill_at = (json.loads(text) for text in sys.argv[1:])
print("ready", flush=True)
trainer = prepare(AdaptationArguments(**arguments), SparseTrainingArguments(**training))
trainer.add_callback(Kill())
run(trainer)
"""


@pytest.fixture
def chosen(arguments):
    """Return a function that gives the settings of a run as plain values."""

    def choose(output_dir, steps, kept):
        settings = arguments(lora_dropout=0.2, length=32).as_json()
        training = {
            "output_dir": str(output_dir),
            "max_steps": steps,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "cosine",
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": kept,
            "logging_steps": 10,
            "disable_tqdm": True,
            "use_cpu": True,
            "report_to": "none",
            "seed": 1,
            "resume_from_checkpoint": "auto",
        }
        return settings, training

    return choose


def start(settings, kill_at=-1):
    """Start a training in a process of its own; return it once its imports are done."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *(json.dumps(value) for value in (*settings, kill_at))],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n", process.communicate()
    return process


def here(settings):
    arguments, training = settings
    return run(prepare(AdaptationArguments(**arguments), SparseTrainingArguments(**training)))


def test_a_process_killed_between_two_checkpoints(chosen, tmp_path):
    killed = start(chosen(tmp_path / "run", 5, kept=1), kill_at=3)
    _, errors = killed.communicate(timeout=200)
    assert killed.returncode == -signal.SIGKILL, errors
    assert names(tmp_path / "run") == ["checkpoint-2"], "a half-written checkpoint, or an adapter"
    resumed = here(chosen(tmp_path / "run", 5, kept=1))
    straight = here(chosen(tmp_path / "straight", 5, kept=1))
    for folder in (resumed.parent, straight.parent):
        assert [name for name in names(folder) if "checkpoint" in name] == ["checkpoint-5"]
    assert same(adapter(resumed), adapter(straight))
    assert same(adapter(resumed), adapter(resumed.parent / "checkpoint-5"))
    sidecars = [
        (folder / "sparse_attention.json").read_text()
        for folder in (resumed, resumed.parent / "checkpoint-5")
    ]
    assert sidecars[0] == sidecars[1]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_at_twenty_random_moments(chosen, tmp_path, capsys):
    """The moments are spread over a run's whole time, its start and its saves among them; finished runs start anew."""
    began = start(chosen(tmp_path / "straight", STEPS, kept=2))
    clock = time.monotonic()
    _, errors = began.communicate(timeout=400)
    assert began.returncode == 0, errors
    duration = time.monotonic() - clock
    want = adapter(tmp_path / "straight" / "adapter")

    draw, kills, runs, amid_saves, moments, step = random.Random(7), 0, 0, 0, [], 0
    while kills < 20 or runs == 0 or (tmp_path / f"run-{runs}").exists():
        folder = tmp_path / f"run-{runs}"
        process = start(chosen(folder, STEPS, kept=2))
        try:
            # at most about as long as the rest of the run takes; one whose last step is saved may end
            process.wait(
                draw.uniform(0, duration * (1 - step / STEPS)) if kills < 20 and step < STEPS else 400
            )
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        left = names(folder) if folder.exists() else []
        whole = [name for name in left if name.startswith("checkpoint-")]
        assert all(find_flaw(folder / name) is None for name in whole), left
        if process.returncode == 0:
            assert same(adapter(folder / "adapter"), want)
            runs, step = runs + 1, 0
            continue
        assert process.returncode == -signal.SIGKILL
        kills += 1
        amid_saves += any(name.startswith(".checkpoint") for name in left)
        step = max((int(name.partition("-")[2]) for name in whole), default=0)
        moments.append(step)
    with capsys.disabled():
        print(
            f"\n{kills} kills after steps {moments}, {amid_saves} amid a save; {runs} runs of {duration:.1f} s ended "
            "with the same bits"
        )
