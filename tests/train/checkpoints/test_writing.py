"""What is on disk while a checkpoint is written, and after that failed."""

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from transformers import TrainerCallback

from hf_sparse.train import last_complete_checkpoint
from hf_sparse.train.checkpoints import find_flaw
from hf_sparse.train.checkpoints.folders import remove_leftovers

from .runs import Killed, adapter, names, same


class Room(TrainerCallback):
    """From a step on, no file may be longer than a limit, as on a full disk."""

    def __init__(self, step, most):
        self.step, self.most = step, most

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (self.most, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
            )


@pytest.fixture
def unlimited():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "too_long", ["adapter_model.safetensors", "optimizer.safetensors", "random_state_0.json"]
)
def test_a_full_disk_is_named_and_the_run_goes_on_from_the_checkpoint_before(
    trainer, straight, run, unlimited, too_long
):
    full = trainer("run", limit=1)
    full.add_callback(Room(3, (straight / "checkpoint-3" / too_long).stat().st_size - 1))
    with pytest.raises(OSError) as caught:
        full.train("auto")
    unlimited()
    assert caught.value.filename == str(run / "checkpoint-3") and "\n" not in str(caught.value)
    assert "cannot be written" in str(caught.value) and "make room, then go on" in str(caught.value)
    assert names(run) == ["checkpoint-1", "checkpoint-2"]
    trainer("run", limit=1).train("auto")
    assert same(adapter(run / "checkpoint-9"), adapter(straight / "checkpoint-9"))


def test_the_error_of_the_disk_keeps_its_number(trainer, monkeypatch):
    made = trainer(save_steps=4)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"checkpoint-4 cannot be written \(No space left on device\)"
    ) as caught:
        made.train()
    assert caught.value.errno == errno.ENOSPC
    assert names(made.tmp / "run") == []


def test_killed_at_every_call_that_changes_the_disk(trainer, run, monkeypatch):
    """What has a checkpoint's name is whole, one is always there, and what is hidden goes with the next start."""
    made = trainer(limit=2, max_steps=3)
    made.train("auto")
    first, run = run, made.tmp / "tried"  # checkpoint-3 is there, to be replaced, and -2, to go after that
    made.limit = 1
    made.args.output_dir = str(run)
    # a kill leaves what is half-written
    monkeypatch.setattr("hf_sparse.train.checkpoints.trainer.forget", lambda folder: None)
    killed, before = True, 0
    while killed:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(first, run)
        killed = killed_before(before, lambda: made._save_checkpoint(made.model, None), monkeypatch)
        whole = [name for name in names(run) if not name.startswith(".")]
        assert whole and all(find_flaw(run / name) is None for name in whole), before
        remove_leftovers(run)
        assert names(run) == whole
        before += 1
    assert whole == ["checkpoint-3"] and before > 30


def killed_before(count, write, monkeypatch):
    """Write, killed before the disk is changed for the `count`-th time; False where it came to its end."""
    left = [count]

    def counted(call):
        def stop_or_call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return call(*args, **kwargs)

        return stop_or_call

    with monkeypatch.context() as patched:
        for name in ("fsync", "replace", "unlink", "mkdir", "rmdir"):
            patched.setattr(os, name, counted(getattr(os, name)))
        for name in ("write_bytes", "write_text"):
            patched.setattr(Path, name, counted(getattr(Path, name)))
        try:
            write()
        except Killed:
            return True
    return False


def test_old_checkpoints_go_only_after_the_new_one_is_whole(trainer, killed, monkeypatch):
    import hf_sparse.train.checkpoints.trainer as module

    seen = []
    remove = module.remove_old

    def watched(newest, limit, best):
        seen.append((newest.name, find_flaw(newest), names(newest.parent)))
        remove(newest, limit, best)

    monkeypatch.setattr(module, "remove_old", watched)
    killed(3, limit=1)
    assert seen == [
        ("checkpoint-1", None, ["checkpoint-1"]),
        ("checkpoint-2", None, ["checkpoint-1", "checkpoint-2"]),
        ("checkpoint-3", None, ["checkpoint-2", "checkpoint-3"]),
    ]


def test_what_a_killed_run_left_half_written_goes_with_the_next_start(trainer, run):
    for name in (".checkpoint-3.writing", ".checkpoint-1.leaving"):
        shutil.copytree(run / "checkpoint-2", run / name)
    assert last_complete_checkpoint(run) == run / "checkpoint-2"
    trainer("run", max_steps=3).train("auto")
    assert names(run) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("name", ["enable_jit_checkpoint", "save_only_model", "save_on_each_node"])
def test_settings_without_whole_checkpoints_are_refused(trainer, name):
    with pytest.raises(ValueError, match=rf"{name}=True is not supported: .*; leave it out"):
        trainer(**{name: True})


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor"])
def test_optimizers_of_tensors_and_numbers_are_taken(trainer, name):
    made = trainer(optim=name, max_steps=2, kill_at=1)
    with pytest.raises(Killed):
        made.train()
    trainer(optim=name, max_steps=2).train("auto")
    trainer("straight", optim=name, max_steps=2).train()
    assert same(adapter(made.tmp / "run" / "checkpoint-2"), adapter(made.tmp / "straight" / "checkpoint-2"))


class Remembering(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight]["seen"] = {1, 2}


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ((Remembering, {"lr": 0.1}), r"cannot be saved safely: its state\['state'\].*\['seen'\].* is a set"),
        ((torch.optim.SGD, {"lr": 0.1, "params": []}), "needs params of its own"),
    ],
)
def test_optimizers_of_more_are_refused_before_training(trainer, chosen, reason):
    with pytest.raises(ValueError, match=rf"optim=\S+ {reason}.*; use optim=adamw_torch"):
        trainer(optimizer_cls_and_kwargs=chosen)
    trainer(optimizer_cls_and_kwargs=chosen, save_strategy="no")


def test_an_optimizer_whose_library_is_not_here_is_refused_by_its_name(trainer, monkeypatch):
    def absent(_args, _model):
        raise ImportError("You need to install\n`lomo`")

    monkeypatch.setattr(transformers.Trainer, "get_optimizer_cls_and_kwargs", staticmethod(absent))
    with pytest.raises(
        ValueError, match=r"optim=lomo needs a library .* \(You need to install `lomo`\); install it, or"
    ):
        trainer(optim="lomo")
