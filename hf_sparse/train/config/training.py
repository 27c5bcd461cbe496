"""The settings of transformers' Trainer, with what a patched model needs of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from ...evaluate.callback import LOWER_IS_BETTER
from .fields import check_least, option


@dataclass
class SparseTrainingArguments(TrainingArguments):
    """TrainingArguments with every column kept: a patched model may read columns the Trainer would drop."""

    remove_unused_columns: bool = option(False, "drop the columns that the model's forward does not name")
    trust_engine_state: bool = option(
        False,
        "resume from files that DeepSpeed or FSDP wrote; they are in part pickles, which can run code: only where you "
        "wrote the checkpoint yourself",
    )

    def __post_init__(self) -> None:
        check_least("per_device_train_batch_size", self.per_device_train_batch_size, 1)
        check_least("gradient_accumulation_steps", self.gradient_accumulation_steps, 1)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be between 0 and {2**32 - 1}, got {self.seed}.")
        if not (0.0 < self.learning_rate < math.inf):
            raise ValueError(
                f"learning_rate must be above 0, got {self.learning_rate}; 1e-4 is a good start for a large model."
            )
        if not (0.0 <= self.weight_decay < math.inf):
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}; 0 leaves it out.")
        if self.greater_is_better is None and str(self.metric_for_best_model).endswith(LOWER_IS_BETTER):
            self.greater_is_better = False  # transformers takes every name but ...loss for a score
        if not torch.accelerator.is_available():
            self.use_cpu = True  # without it, transformers refuses bf16 on a machine that has only its CPU
        super().__post_init__()
