"""Where results go: whether they can be written, found out before anything is computed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ..hf.atomic_file import write_atomically

__all__ = ["check_output_folder", "write_atomically", "write_folder"]


def check_output_folder(setting: str, wanted: str | os.PathLike[str]) -> None:
    """Raise ValueError where the folder neither is one nor can be made, or cannot be written; leave nothing behind.

    Args:
        setting: what the user calls it, to be named in the message.
    """
    name = os.fspath(wanted)
    if not name or "\0" in name:
        raise ValueError(f"{setting} {name!r} is no name of a folder; name another one.")
    folder = Path(name)
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            raise ValueError(f"{setting} {name}: {folder} is a file; name a folder.")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ValueError(f"{setting} {name} cannot be written ({reason}); name another folder.") from None


def write_folder(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write every file whole or not at all, in order, and return their paths; the folder is made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]
