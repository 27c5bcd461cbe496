"""Which checkpoint a run goes on from."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from .folders import by_step
from .manifest import find_flaw, read_manifest, refuse_foreign

logger = logging.getLogger(__name__)


def last_complete_checkpoint(
    output_dir: str | os.PathLike[str], *, trust_engine_state: bool = False
) -> Path | None:
    """Return the newest checkpoint whose files are all as they were written, None where there is none.

    Logs one warning for each newer one that was passed over.

    Raises:
        ValueError: a newer one, or this one, holds a file that somebody put there, see `refuse_foreign`.
    """
    for folder in reversed(by_step(Path(output_dir))):
        refuse_foreign(folder, trust_engine_state=trust_engine_state)
        if (flaw := find_flaw(folder)) is None:
            return folder
        logger.warning("passing over checkpoint %s: %s", folder, flaw)
    return None


def checkpoint_to_resume(
    wanted: str | None, output_dir: str, trained_with: dict[str, Any], *, trust_engine_state: bool = False
) -> Path | None:
    """Return the checkpoint that ``resume_from_checkpoint`` means: a folder, or the last whole one for "auto".

    Raises:
        ValueError: the folder named is no whole checkpoint, was trained with other settings than these, or holds a
            file that somebody put there.
    """
    if not wanted or wanted.lower() == "false":
        return None
    if wanted.lower() in ("auto", "true"):
        folder = last_complete_checkpoint(output_dir, trust_engine_state=trust_engine_state)
        if folder is None:
            return None
    else:
        folder = Path(wanted)
        refuse_foreign(folder, trust_engine_state=trust_engine_state)
        if flaw := find_flaw(folder):
            raise ValueError(
                f"cannot resume from {wanted}: {flaw}; use 'auto' for the last whole checkpoint."
            )
    manifest = read_manifest(folder)
    assert manifest is not None, "a whole checkpoint has a manifest"
    before, now = manifest["trained_with"], json.loads(json.dumps(trained_with))
    for name in now:
        if before.get(name) != now[name]:
            raise ValueError(
                f"{folder} was trained with {name}={before.get(name)!r}, not {now[name]!r}; "
                f"give another --output_dir, or the same settings."
            )
    return folder


def check_same_engine(folder: Path, engine: str | None) -> None:
    """Raise ValueError where another engine than this run's wrote the checkpoint."""
    manifest = read_manifest(folder)
    assert manifest is not None, "a whole checkpoint has a manifest"
    if manifest["engine"] != engine:
        raise ValueError(
            f"{folder} was written {_under(manifest['engine'])} and cannot be read {_under(engine)}; launch the "
            "training as before, or give another --output_dir."
        )


def _under(engine: str | None) -> str:
    return "without an engine" if engine is None else f"under {engine}"
