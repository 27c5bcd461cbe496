"""The Trainer whose state is saved as safetensors and JSON wherever transformers would save a pickle."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from .random_state import random_state, restore_random_state
from .state import has_state, load_state, save_state

logger = logging.getLogger(__name__)
OPTIMIZER, SCHEDULER, SCALER = "optimizer", "scheduler", "scaler"


class SafeStateTrainer(Trainer):
    """Saves and loads the parts of a checkpoint; what DeepSpeed and FSDP shard is left to them and transformers."""

    @property
    def engine(self) -> str | None:
        """The engine that writes its own part of a checkpoint, in files that are not safe to read."""
        if self.is_deepspeed_enabled:
            return "deepspeed"
        return "fsdp" if self.is_fsdp_enabled else None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.save_pretrained(str(folder), state_dict=state_dict)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card

    def _save_trainer_state(self, folder: Path) -> None:
        callbacks: list[Any] = [*self.callback_handler.callbacks, self.control]
        stateful: list[Any] = [each for each in callbacks if isinstance(each, ExportableState)]
        exported = TrainerState(stateful_callbacks=stateful)
        written = copy.copy(self.state)
        written.stateful_callbacks = exported.stateful_callbacks
        written.best_model_checkpoint = None  # found by its step, for the run's folder may be moved
        written.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.engine is not None:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            assert self.optimizer is not None and self.lr_scheduler is not None
            save_state(Path(output_dir), OPTIMIZER, self.optimizer.state_dict())
            save_state(Path(output_dir), SCHEDULER, self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.engine is not None:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            assert self.optimizer is not None and self.lr_scheduler is not None
            self.optimizer.load_state_dict(load_state(Path(checkpoint), OPTIMIZER))
            self.lr_scheduler.load_state_dict(load_state(Path(checkpoint), SCHEDULER))

    def _save_scaler(self, output_dir: str) -> None:
        if self.args.should_save and (scaler := getattr(self.accelerator, "scaler", None)) is not None:
            save_state(Path(output_dir), SCALER, scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint is not None and scaler is not None and has_state(Path(checkpoint), SCALER):
            scaler.load_state_dict(load_state(Path(checkpoint), SCALER))

    def _save_rng_state(self, output_dir: str) -> None:
        save_state(Path(output_dir), self._random_name(), random_state(self.args.device))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if not has_state(Path(checkpoint), self._random_name()):
            logger.warning(
                "%s has no random state of process %d: another number of processes wrote it, and dropout will not be "
                "that of one uninterrupted run",
                checkpoint,
                self.args.process_index,
            )
            return
        restore_random_state(load_state(Path(checkpoint), self._random_name()), self.args.device)

    def _random_name(self) -> str:
        return f"random_state_{self.args.process_index}"
