"""The course of a training: how many samples it sees, and what two runs must share to be one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from ..documents import Document, fingerprint
from .config import AdaptationArguments

_CONSTANT = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)
_COURSE = (
    *("seed", "data_seed", "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "bf16", "fp16"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "lr_scheduler_kwargs"),
    *("neftune_noise_alpha", "train_sampling_strategy", "dataloader_drop_last"),
)
POOL = 4  # samples drawn for each one that will be seen: training draws from more documents than it needs


def trained_with(
    arguments: AdaptationArguments, training: TrainingArguments, documents: Iterable[Document]
) -> dict[str, Any]:
    """Return, as plain JSON values, what two runs must share for one to go on from the other's checkpoints."""
    return {
        **arguments.decides_weights(),
        **course_of(training, narrows=arguments.narrow_from is not None),
        "texts (SHA-256)": fingerprint(documents),
    }


def samples_wanted(training: TrainingArguments) -> int | None:
    """Return how many samples are made for a training of so many steps; None for all there are."""
    if training.max_steps <= 0:
        return None
    return POOL * training.max_steps * samples_per_step(training)


def samples_per_step(training: TrainingArguments) -> int:
    """Return the samples of a step, of all batches and processes."""
    return training.train_batch_size * training.gradient_accumulation_steps * training.world_size


def check_steps(training: TrainingArguments, samples: int) -> None:
    """Raise ValueError where a training on so many samples would end before its first step."""
    if training.max_steps <= 0 and not 0 < training.num_train_epochs < math.inf:
        raise ValueError(
            f"num_train_epochs={training.num_train_epochs} and max_steps={training.max_steps} train nothing; set one "
            "of them above 0."
        )
    batch = training.train_batch_size * training.world_size
    if training.dataloader_drop_last and samples < batch:
        raise ValueError(
            f"dataloader_drop_last=True leaves out all {samples} samples, fewer than the {batch} of a batch; give more "
            "text or a smaller per_device_train_batch_size, or leave it out."
        )


def course_of(training: TrainingArguments, *, narrows: bool) -> dict[str, Any]:
    """Return what decides which samples a step sees and how far it goes: a run that goes on with others is another run.

    How long the training is counts only where the learning rate or the window depends on it.

    Args:
        narrows: a window beside the pattern narrows with the steps.
    """
    scheduler = SchedulerType(training.lr_scheduler_type)
    lengths = () if scheduler in _CONSTANT and not narrows else ("max_steps", "num_train_epochs")
    names = (*_COURSE, *lengths)
    return {
        "batch size * gradient_accumulation_steps * processes": samples_per_step(training),
        "lr_scheduler_type": scheduler.value,
        "optim": str(OptimizerNames(training.optim).value),
        **{name: getattr(training, name) for name in names},
    }
