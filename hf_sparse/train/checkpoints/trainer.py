"""The Trainer with checkpoints that are whole or not there, hold safetensors and JSON, and continue bit by bit."""

from __future__ import annotations

import errno
import json
import logging
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ...hf import settings_to_json
from ...hf.sources import SIDECAR
from ...hf.stored_settings import SparseSettings
from .folders import begin, checkpoint_folder, finish, forget, hidden, remove_leftovers, remove_old
from .limits import check_optimizer, check_supported
from .manifest import find_flaw, refuse_foreign, write_manifest
from .random_state import kept_random_state
from .resume import check_same_engine, checkpoint_to_resume
from .safe_state import SafeStateTrainer

logger = logging.getLogger(__name__)


class CheckpointTrainer(SafeStateTrainer):
    """Trains a PeftModel; a run that was killed goes on, on the CPU with the same bits.

    A folder named checkpoint-N is whole. It holds the adapter, the states of optimizer, scheduler, gradient scaler and
    random numbers, the pattern and a manifest. DeepSpeed and FSDP write files of their own instead of the optimizer's:
    these are in part pickles, so they are read only with ``trust_engine_state``. The tokenizer is not among the files,
    nothing here is sent to the hub, and evaluating leaves the random states as they were.

    Args:
        trained_with: plain JSON values; a run with others may not go on from these checkpoints.
        sparse_settings: the pattern that the adapter is for, which is saved with it.
        limit: checkpoints kept, the best one not counted; None keeps all.
        args, kwargs: as for transformers' Trainer.
    Raises:
        ValueError: settings under which no checkpoint could be whole or safe.
    """

    def __init__(
        self,
        *args: Any,
        trained_with: dict[str, Any],
        sparse_settings: SparseSettings,
        limit: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        assert self.args.save_total_limit is None, "old checkpoints are deleted here, by limit"
        self.trained_with, self.sparse_settings, self.limit = trained_with, sparse_settings, limit
        check_supported(self.args)
        if self.engine is None and self.args.save_strategy != "no":
            check_optimizer(self)
        if self.args.resume_from_checkpoint:
            self._checked(str(self.args.resume_from_checkpoint))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from a checkpoint where one is named; True or "auto" is the last whole one of ``output_dir``."""
        folder = self._checked(str(resume_from_checkpoint)) if resume_from_checkpoint else None
        if self.args.should_save:
            remove_leftovers(str(self.args.output_dir))
        return super().train(None if folder is None else str(folder), *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with kept_random_state(self.args.device):  # or a run evaluated at other steps would train otherwise
            return super().evaluate(*args, **kwargs)

    def _checked(self, wanted: str) -> Path | None:
        trust = getattr(self.args, "trust_engine_state", False)
        folder = checkpoint_to_resume(
            wanted, str(self.args.output_dir), self.trained_with, trust_engine_state=trust
        )
        if folder is not None:
            check_same_engine(folder, self.engine)
        return folder

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        start = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None:
            return start
        self._find_best(Path(resume_from_checkpoint).parent)
        # transformers would train one step more from a checkpoint of the last step
        return (math.ceil(num_train_epochs), 0) if self.state.global_step >= max_steps else start

    def _find_best(self, run: Path) -> None:
        """Name the best checkpoint, which lies beside the one resumed, wherever that run was moved to."""
        if self.state.best_global_step is None:
            return
        best = checkpoint_folder(run, self.state.best_global_step)
        if best.is_dir() and (flaw := find_flaw(best)) is None:
            self.state.best_model_checkpoint = str(best)
            return
        flaw = flaw if best.is_dir() else "it is gone"
        logger.warning(
            "the best checkpoint was %s: %s; the best one is sought anew from here on", best.name, flaw
        )
        self.state.best_global_step = self.state.best_metric = self.state.best_model_checkpoint = None

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        refuse_foreign(best, trust_engine_state=True)  # under an engine, this run or a trusted one wrote it
        if flaw := find_flaw(best):
            raise ValueError(
                f"the best checkpoint {best} cannot be loaded: {flaw}; the last adapter is in the newest checkpoint."
            )
        super()._load_best_model()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = checkpoint_folder(self._get_output_dir(trial), self.state.global_step)
        if trial is None:
            self.store_flos()
        try:
            self._write_checkpoint(folder)
        except BaseException as error:
            if self.args.should_save:
                forget(folder)
            if isinstance(error, (OSError, SafetensorError)):
                raise _not_written(folder, error) from error
            raise
        if self.state.best_global_step is not None:
            best = checkpoint_folder(folder.parent, self.state.best_global_step)
            if best.is_dir():
                self.state.best_model_checkpoint = str(best)
        if self.args.should_save and self.limit is not None:
            kept = self.state.best_model_checkpoint
            remove_old(folder, self.limit, Path(kept) if kept else None)

    def _write_checkpoint(self, folder: Path) -> None:
        if self.args.should_save:
            begin(folder)
        self.accelerator.wait_for_everyone()
        unfinished = hidden(folder)
        self.save_model(str(unfinished), _internal_call=True)
        self._save_optimizer_and_scheduler(str(unfinished))
        self._save_scaler(str(unfinished))
        self._save_rng_state(str(unfinished))
        if self.args.should_save:
            self._save_trainer_state(unfinished)
            sidecar = json.dumps(settings_to_json(self.sparse_settings), indent=2, sort_keys=True) + "\n"
            (unfinished / SIDECAR).write_text(sidecar, encoding="utf-8")
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(unfinished, self.trained_with, self.engine)
            finish(folder)
        self.accelerator.wait_for_everyone()


def _not_written(folder: Path, error: BaseException) -> OSError:
    number = getattr(error, "errno", None) or errno.EIO
    reason = getattr(error, "strerror", None) or str(error)
    return OSError(
        number,
        f"{folder.name} cannot be written ({reason}); make room, then go on with resume_from_checkpoint=auto",
        str(folder),
    )
