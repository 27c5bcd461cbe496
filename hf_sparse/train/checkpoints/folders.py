"""The checkpoint folders of a run: one that has its final name is whole, whatever ends the process."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .manifest import sync_folder


def checkpoint_folder(output_dir: str | os.PathLike[str], step: int) -> Path:
    return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def by_step(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders, oldest first."""
    folders = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    return sorted((path for path in folders if _step(path) is not None), key=lambda path: _step(path) or 0)


def begin(folder: Path) -> None:
    """Make the empty, hidden folder in which `folder` is written."""
    shutil.rmtree(hidden(folder), ignore_errors=True)
    hidden(folder).mkdir(parents=True)


def finish(folder: Path) -> None:
    """Give the written folder its name; one that already has it goes."""
    replaced = _set_aside(folder) if folder.exists() else None
    os.replace(hidden(folder), folder)
    sync_folder(folder.parent)
    if replaced is not None:
        shutil.rmtree(replaced)


def forget(folder: Path) -> None:
    """Delete what was begun; what cannot be deleted goes with the next start."""
    shutil.rmtree(hidden(folder), ignore_errors=True)


def hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.writing")


def remove(folder: Path) -> None:
    """Delete a checkpoint; killed amid this, half of it is left under a hidden name only."""
    shutil.rmtree(_set_aside(folder))


def _set_aside(folder: Path) -> Path:
    aside = folder.with_name(f".{folder.name}.leaving")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    return aside


def remove_leftovers(output_dir: str | os.PathLike[str]) -> None:
    """Delete what a killed run was writing or deleting."""
    for path in Path(output_dir).glob(f".{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(path)


def remove_old(newest: Path, limit: int, best: Path | None) -> None:
    """Delete the oldest checkpoints before `newest`, so that with it `limit` are left; the best one stays as well.

    Those of later steps, which a run that went on from an earlier one will replace, count for nothing.
    """
    older = [path for path in by_step(newest.parent) if (_step(path) or 0) < (_step(newest) or 0)]
    for path in older[: max(len(older) - max(limit, 1) + 1, 0)]:
        if best is None or path.name != best.name:
            remove(path)


def _step(folder: Path) -> int | None:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else None
