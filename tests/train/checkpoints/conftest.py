"""A tiny training, made in a moment, and what it leaves."""

import functools
import shutil

import pytest

from .runs import STEPS, Killed, make_trainer


@pytest.fixture
def trainer(tmp_path):
    """Return a function that makes the Trainer of a tiny patched model with LoRA and dropout."""
    return functools.partial(make_trainer, tmp_path)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The folder of a run with a checkpoint of every step, which no test may change."""
    made = make_trainer(tmp_path_factory.mktemp("uninterrupted"))
    made.train()
    assert made.state.global_step == STEPS
    return made.tmp / "run"


@pytest.fixture
def straight(uninterrupted, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(uninterrupted, tmp_path / "straight")


@pytest.fixture
def run(uninterrupted, tmp_path):
    """The folder of a run that was killed after two steps."""
    for step in (1, 2):
        shutil.copytree(uninterrupted / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    return tmp_path / "run"


@pytest.fixture
def killed(trainer):
    """Return a function that trains until a step is done, then stops as a kill does; it gives the run's folder."""

    def run(step, folder="run", **changes):
        stopped = trainer(folder, kill_at=step, **changes)
        with pytest.raises(Killed):
            stopped.train(stopped.args.resume_from_checkpoint)
        return stopped.tmp / folder

    return run
