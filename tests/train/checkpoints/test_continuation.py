"""A run that was stopped and goes on ends with the bits of the run that was not."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_sparse.train.checkpoints import find_flaw
from hf_sparse.train.checkpoints.random_state import random_state, restore_random_state
from hf_sparse.train.checkpoints.state import load_state, save_state

from .runs import STEPS, adapter, names, same


def test_within_epochs_and_between_them_a_run_ends_with_the_same_bits(trainer, straight):
    want = adapter(straight / f"checkpoint-{STEPS}")
    assert not same(adapter(straight / "checkpoint-1"), want)
    for step in (1, 3, 5, 6, STEPS):
        resumed = trainer(f"resumed-{step}", resume_from_checkpoint=str(straight / f"checkpoint-{step}"))
        resumed.train(resumed.args.resume_from_checkpoint)
        assert resumed.state.global_step == STEPS, "no step is trained beyond the last"
        resumed.save_model(resumed.tmp / "end")
        assert same(adapter(resumed.tmp / "end"), want), step


def test_dropout_and_the_optimizer_are_part_of_it(trainer, straight):
    """Without the random state, or without the optimizer's, the bits differ: the test above sees them."""
    want = adapter(straight / f"checkpoint-{STEPS}")
    for hook in ("_load_rng_state", "_load_optimizer_and_scheduler"):
        resumed = trainer(hook)
        setattr(resumed, hook, lambda checkpoint: None)
        resumed.train(str(straight / "checkpoint-2"))
        assert not same(adapter(resumed.tmp / hook / f"checkpoint-{STEPS}"), want)


def test_killed_again_and_again_with_one_checkpoint_kept(trainer, killed, straight):
    killed(4, save_steps=3, limit=1)
    assert names(straight.parent / "run") == ["checkpoint-3"]
    killed(7, save_steps=3, limit=1, resume_from_checkpoint="auto")
    assert names(straight.parent / "run") == ["checkpoint-6"]
    last = trainer("run", save_steps=3, limit=1)
    last.train("auto")
    assert names(straight.parent / "run") == ["checkpoint-9"]
    assert same(adapter(straight.parent / "run" / "checkpoint-9"), adapter(straight / "checkpoint-9"))


def test_evaluations_change_nothing(trainer, killed, straight):
    evaluated = {"eval_strategy": "epoch", "eval_on_start": True}
    run = killed(3, **evaluated)  # killed before the evaluation of the first epoch, or right after it
    resumed = trainer("run", **evaluated)
    resumed.train("auto")
    assert same(adapter(run / "checkpoint-9"), adapter(straight / "checkpoint-9"))


def test_nothing_but_safetensors_and_json(straight):
    assert {path.suffix for path in straight.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    assert json.loads((straight / "checkpoint-9" / "sparse_attention.json").read_text())["pattern"] == {
        "name": "sliding_window",
        "options": {"window": 8},
    }


def test_every_value_of_a_state_comes_back_as_it_was(tmp_path):
    shared = torch.arange(6.0)
    state = {
        "state": {
            0: {"step": torch.tensor(3.0), "low": torch.tensor([1.1, float("nan")], dtype=torch.bfloat16)}
        },
        "groups": [{"betas": (0.9, 0.999), "lr": 0.1 + 0.2, "n": 1, "one": 1.0, "flag": True, "none": None}],
        "views": [shared[:4], shared[2:], shared.view(2, 3).T, torch.tensor([], dtype=torch.uint8)],
        "limits": (float("inf"), -float("inf"), 5e-324, 2**70, "ä"),
        "empty": [(), {}, []],
        "tensor": {"tensor": "0", "dict": []},
    }
    save_state(tmp_path, "some", state)
    got = load_state(tmp_path, "some")

    def described(value):
        if isinstance(value, torch.Tensor):
            return value.dtype, value.shape, value.reshape(-1).contiguous().view(torch.uint8).tolist()
        if isinstance(value, dict):
            return {key: described(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value), [described(item) for item in value]
        return type(value), value

    assert described(got) == described(state)


def test_the_random_states_come_back(tmp_path):
    def drawn():
        return (
            random.gauss(0, 1),
            random.random(),
            np.random.standard_normal(3).tolist(),
            torch.rand(3).tolist(),
        )

    drawn()  # half of a pair of normal numbers is then waiting in Python's and numpy's
    save_state(tmp_path, "random", random_state(torch.device("cpu")))
    want = drawn()
    drawn()
    restore_random_state(load_state(tmp_path, "random"), torch.device("cpu"))
    assert drawn() == want


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,  # on random tokens the held-out loss only grows: an early step is the best
    "load_best_model_at_end": True,
}


def test_the_best_adapter_is_kept_and_loaded_though_the_run_was_moved(trainer, killed):
    whole = trainer("whole", **BEST, limit=1)
    whole.train()
    step = whole.state.best_global_step
    assert step < 7
    assert names(whole.tmp / "whole") == sorted({f"checkpoint-{step}", "checkpoint-9"})
    assert whole.state.best_model_checkpoint == str(whole.tmp / "whole" / f"checkpoint-{step}")
    whole.save_model(whole.tmp / "end")
    assert same(adapter(whole.tmp / "end"), adapter(whole.tmp / "whole" / f"checkpoint-{step}"))

    run = killed(7, **BEST, limit=1)
    shutil.move(run, run.with_name("moved"))
    moved = trainer("moved", **BEST, limit=1)
    moved.train("auto")
    assert moved.state.best_model_checkpoint == str(run.with_name("moved") / f"checkpoint-{step}")
    moved.save_model(run.with_name("again"))
    assert same(adapter(run.with_name("again")), adapter(whole.tmp / "end"))


def test_a_lost_best_adapter_is_said_and_another_one_sought(trainer, killed, caplog):
    run = killed(7, **BEST)
    first = json.loads((run / "checkpoint-7" / "trainer_state.json").read_text())["best_global_step"]
    shutil.rmtree(run / f"checkpoint-{first}")
    resumed = trainer("run", **BEST)
    resumed.train("auto")
    assert f"the best checkpoint was checkpoint-{first}: it is gone" in caplog.text
    assert resumed.state.best_global_step > 7


def test_a_best_adapter_that_was_damaged_meanwhile_is_not_loaded(trainer):
    made = trainer(**BEST)
    made.train()
    os.truncate(Path(made.state.best_model_checkpoint) / "adapter_model.safetensors", 100)
    with pytest.raises(
        ValueError, match=r"the best checkpoint .* cannot be loaded: adapter_model.safetensors has 100"
    ):
        made._load_best_model()


def test_a_run_from_an_earlier_checkpoint_replaces_the_later_ones(trainer, straight):
    want = adapter(straight / "checkpoint-9")
    os.truncate(straight / "checkpoint-5" / "adapter_model.safetensors", 100)
    trainer("straight").train(str(straight / "checkpoint-4"))
    assert names(straight) == [f"checkpoint-{step}" for step in range(1, STEPS + 1)]
    assert all(find_flaw(folder) is None for folder in straight.iterdir())
    assert same(adapter(straight / "checkpoint-9"), want)


def test_later_checkpoints_of_another_run_do_not_push_out_this_ones(trainer, killed, straight):
    killed(6, "straight", limit=2, resume_from_checkpoint=str(straight / "checkpoint-4"))
    assert names(straight) == [f"checkpoint-{step}" for step in (5, 6, 7, 8, 9)]
