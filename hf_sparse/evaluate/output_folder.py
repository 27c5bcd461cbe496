"""Where results go: whether they can be written, found out before anything is computed, and files that are whole."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


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


def write_atomically(path: Path, content: bytes) -> None:
    """Let `path` hold `content`, or leave it as it was.

    Raises:
        OSError: it cannot be written, such as on a full disk; `path` is named.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)  # mkstemp gives 0600; give what open() would
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None  # a full disk names no file
        raise
