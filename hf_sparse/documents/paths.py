"""Which files are meant: paths as they are, folders by what is in them."""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePath

# What is read of a folder; a file that is named itself, or chosen by a glob, may end in anything.
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".java", ".js", ".ts", ".go", ".rs"),
    *(".rb", ".sh", ".sql", ".jl", ".r", ".scala", ".swift", ".kt", ".php", ".lua", ".pl", ".hs"),
)
_TABLES = (".jsonl", ".parquet")
ROW_SUFFIXES = (*_TABLES, ".json")  # .json in a folder is mostly a setting, so it must be asked for


def list_files(paths: list[Path], glob: str | None) -> list[Path]:
    """Return the paths in order, each folder replaced by those of its files that are read, sorted.

    Raises:
        ValueError: a path that is missing or cannot be read, a folder without such files, `glob` without a folder.
    """
    folders = [is_folder(path) for path in paths]
    if glob is not None and not any(folders):
        raise ValueError(f"the glob {glob!r} chooses files of folders, and no folder is given; leave it out.")
    if glob is not None and not PurePath(glob).parts:
        raise ValueError(f"the glob {glob!r} matches no file; write one such as *.md.")
    return [
        file
        for path, folder in zip(paths, folders, strict=True)
        for file in (_files_of(path, glob) if folder else [path])
    ]


def is_folder(path: Path) -> bool:
    """Raise ValueError where nothing is there."""
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r} is no file name, it holds a null byte; check the spelling.")
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> ValueError:
    """What to raise where the system refuses a path."""
    if isinstance(error, FileNotFoundError):
        return ValueError(f"{path} does not exist; check the spelling or give the full path.")
    return ValueError(f"{path} cannot be read ({error.strerror or error}); check its permissions.")


def name_of(path: Path) -> str:
    """Return the path as text that can be encoded: a file may be named with bytes that are not UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")


def _files_of(folder: Path, glob: str | None) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise unreadable(Path(error.filename), error)

    found = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name).relative_to(folder) for name in names if not name.startswith(".")]
    wanted = (*TEXT_SUFFIXES, *_TABLES)
    chosen = [p for p in found if (p.suffix.lower() in wanted if glob is None else p.match(glob))]
    files = [folder / path for path in sorted(chosen, key=PurePath.as_posix)]
    files = [path for path in files if path.is_file()]  # neither pipes, which block, nor links to nothing
    if not files:
        what = "no text, .jsonl or .parquet file" if glob is None else f"no file that matches {glob!r}"
        cure = "name the files, or choose with a glob such as *.log" if glob is None else "check the glob"
        raise ValueError(f"the folder {folder} holds {what} (of {len(found)} files); {cure}.")
    return files
