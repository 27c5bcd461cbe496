"""The course of a training: how many samples it sees, and what two runs must share to be one."""

from __future__ import annotations

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
    *("adam_beta1", "adam_beta2", "adam_epsilon"),
)
POOL = 4  # samples drawn for each one that will be seen: training draws from more documents than it needs


def trained_with(
    arguments: AdaptationArguments, training: TrainingArguments, documents: Iterable[Document]
) -> dict[str, Any]:
    """Return, as plain JSON values, what two runs must share for one to go on from the other's checkpoints."""
    return {
        **arguments.decides_weights(),
        **course_of(training),
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


def course_of(training: TrainingArguments) -> dict[str, Any]:
    """Return what decides which samples a step sees and how far it goes: a run that goes on with others is another run.

    How long the training is counts only where the learning rate depends on it.
    """
    scheduler = SchedulerType(training.lr_scheduler_type)
    lengths = () if scheduler in _CONSTANT else ("max_steps", "num_train_epochs")
    names = (*_COURSE, *lengths)
    return {
        "batch size * gradient_accumulation_steps * processes": samples_per_step(training),
        "lr_scheduler_type": scheduler.value,
        "optim": str(OptimizerNames(training.optim).value),
        **{name: getattr(training, name) for name in names},
    }
