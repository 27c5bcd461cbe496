"""Checkpoints that say of themselves whether they are whole, and with which settings they were trained."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..hf import settings, settings_to_json
from ..hf.sources import SIDECAR

MANIFEST = "complete.json"  # written last: sizes of all files, and the settings

logger = logging.getLogger(__name__)


class CheckpointKeeper(TrainerCallback):
    """Completes every checkpoint with the pattern's sidecar and a manifest, then deletes those above the limit.

    The Trainer itself would delete an old checkpoint before the new one is known to be whole; so it is given no limit,
    and the limit is kept here.

    Args:
        trained_with: plain JSON values; a run with others may not go on from these checkpoints.
        limit: checkpoints kept; None keeps all.
    """

    def __init__(self, trained_with: dict[str, Any], limit: int | None) -> None:
        self.trained_with, self.limit = trained_with, limit

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        PartialState().wait_for_everyone()  # every process writes its own random state
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        sparse = settings(kwargs["model"].get_base_model())
        assert sparse is not None, "the model lost its pattern in training"
        write_json(folder / SIDECAR, settings_to_json(sparse))
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        files.pop(MANIFEST, None)
        write_json(folder / MANIFEST, {"files": files, "trained_with": self.trained_with})
        if self.limit is not None:
            best = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else ""
            for old in _by_step(folder.parent)[: -max(self.limit, 1)]:
                if old.name != best:
                    shutil.rmtree(old)


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """Return the newest checkpoint with all its files at their full size, None where there is none.

    Logs one warning for each newer one that was passed over.
    """
    for folder in reversed(_by_step(Path(output_dir))):
        if (flaw := find_flaw(folder)) is None:
            return folder
        logger.warning("passing over checkpoint %s: %s", folder, flaw)
    return None


def find_flaw(folder: Path) -> str | None:
    """Return what is missing from a checkpoint, None for a whole one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, trained_with = manifest["files"], manifest["trained_with"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"it has no readable {MANIFEST}, so it was not written to its end"
    if not isinstance(files, dict) or not files or not isinstance(trained_with, dict):
        return f"its {MANIFEST} does not list its files and settings"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def checkpoint_to_resume(wanted: str | None, output_dir: str, trained_with: dict[str, Any]) -> Path | None:
    """Return the checkpoint that ``resume_from_checkpoint`` means: a folder, or the last whole one for "auto".

    Raises:
        ValueError: the folder named is no whole checkpoint, or was trained with other settings than these.
    """
    if not wanted or wanted.lower() == "false":
        return None
    if wanted.lower() in ("auto", "true"):
        folder = last_complete_checkpoint(output_dir)
        if folder is None:
            return None
    else:
        folder = Path(wanted)
        if flaw := find_flaw(folder):
            raise ValueError(
                f"cannot resume from {wanted}: {flaw}; use 'auto' for the last whole checkpoint."
            )
    before = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["trained_with"]
    now = json.loads(json.dumps(trained_with))
    for name in now:
        if before.get(name) != now[name]:
            raise ValueError(
                f"{folder} was trained with {name}={before.get(name)!r}, not {now[name]!r}; "
                f"give another --output_dir, or the same settings."
            )
    return folder


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename: a reader sees the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _by_step(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders, oldest first."""
    folders = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    steps = {path: path.name.rpartition("-")[2] for path in folders}
    return sorted((path for path in folders if steps[path].isdigit()), key=lambda path: int(steps[path]))
