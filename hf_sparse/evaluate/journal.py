"""Rows of figures appended to a file as they come, so that an interrupted run goes on where it stopped.

A folder holds ``evaluation.json``, what is measured, and ``NAME.jsonl``, one row per line; further processes write
``NAME.1.jsonl``, ... until the rows are complete and lie in one file, in one order. All numbers are finite, so that
every reader of JSON can read them.

Nothing is locked, and no lock outlives a killed run: two runs of the same evaluation at once do the work twice and find
the same rows; a run whose folder another evaluation took over (`overwrite`) ends at its next row.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .output_folder import check_output_folder, write_atomically
from .processes import Processes

IDENTITY = "evaluation.json"
_LONGEST = 60  # characters of a value in a message

Row = dict[str, Any]


class Journal:
    """The rows of one evaluation in `folder`; without a folder they are kept in memory only.

    Args:
        name: of the file, without its ending.
        identity: what is measured, as plain JSON values: rows of another evaluation are never mixed in.
        overwrite: start anew where the folder holds another evaluation.
    Raises:
        ValueError: the folder cannot be written, holds another evaluation and `overwrite` is not set, or holds a file
            that no evaluation wrote or a damaged row; in every process, whichever found it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        name: str,
        identity: dict[str, Any],
        processes: Processes | None = None,
        overwrite: bool = False,
    ) -> None:
        self.processes = processes or Processes()
        self.rows: list[Row] = []
        self._folder, self._name = Path(folder) if folder is not None else None, name
        if self._folder is None:
            return
        flaws = self.processes.gather([self._begin(identity, overwrite) if self.processes.is_main else None])
        if flaws[0]:
            raise ValueError(flaws[0])
        self._folder.mkdir(parents=True, exist_ok=True)
        self._identity = (self._folder / IDENTITY).read_bytes()
        for path in self._paths():
            self.rows += _read(path)
        self.processes.wait()  # every process reads before any appends
        _cut_torn_line(self._path(self.processes.rank))

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows that this process made; they are on disk when this returns.

        Raises:
            ValueError: a number that is not finite, a file that cannot be written, or a folder that another evaluation
                took over meanwhile.
        """
        new = list(rows)
        for row in new:
            _check_finite(row)
        self.rows += new
        if self._folder is None:
            return
        self._check_still_ours()
        path = self._path(self.processes.rank)
        try:
            with open(path, "ab") as file:
                file.write(_lines(new))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ValueError(
                f"{path} cannot be written ({error.strerror}); make room, then run the same again: the rows before "
                "this one are kept."
            ) from None

    def finish(self, order: Callable[[Row], Any]) -> list[Row]:
        """Return the rows of all processes in order, and let the first file hold exactly them.

        Args:
            order: what a row is of, comparable; of several rows of the same the first counts.
        """
        known: dict[Any, Row] = {}
        for row in self.processes.gather(self.rows):
            known.setdefault(order(row), row)
        rows = [known[key] for key in sorted(known)]
        if self._folder is not None and self.processes.is_main:
            self._check_still_ours()
            write_atomically(self._path(0), _lines(rows))
            for path in self._paths():
                if path != self._path(0):
                    path.unlink()
        self.processes.wait()
        return rows

    def _path(self, rank: int) -> Path:
        assert self._folder is not None
        return self._folder / (f"{self._name}.jsonl" if rank == 0 else f"{self._name}.{rank}.jsonl")

    def _paths(self) -> list[Path]:
        """Return the files with rows of this evaluation, the main process's first."""
        assert self._folder is not None
        ours = re.compile(rf"{re.escape(self._name)}(\.\d+)?\.jsonl")
        found = [path for path in self._folder.iterdir() if ours.fullmatch(path.name)]
        return sorted(found, key=lambda path: (path != self._path(0), path.name))

    def _begin(self, identity: dict[str, Any], overwrite: bool) -> str | None:
        """Let the folder hold this evaluation; return what forbids it."""
        assert self._folder is not None
        identity = json.loads(json.dumps(identity))
        try:
            check_output_folder("output", self._folder)
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._matches(identity, overwrite):
                return None
        except ValueError as error:
            return str(error)
        path = self._folder / IDENTITY
        path.unlink(missing_ok=True)  # first: without it, no one takes the rows for his own
        for rows in self._paths():
            rows.unlink()
        write_atomically(path, _lines([identity], indent=2))
        return None

    def _check_still_ours(self) -> None:
        """Raise ValueError where another evaluation was begun in the folder since this one."""
        assert self._folder is not None
        path = self._folder / IDENTITY
        if not path.exists() or path.read_bytes() != self._identity:
            raise ValueError(
                f"something else was begun in {self._folder} while this ran; name another folder for one of them."
            )

    def _matches(self, identity: dict[str, Any], overwrite: bool) -> bool:
        """True where the folder holds this evaluation, False where it holds none or may be overwritten."""
        assert self._folder is not None
        path = self._folder / IDENTITY
        if not path.exists():
            if self._paths() and not overwrite:
                raise ValueError(
                    f"{self._path(0)} exists, but no {IDENTITY} says what it is of; "
                    "name another folder, or overwrite it (--overwrite)."
                )
            return False
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found == identity:
            return True
        if overwrite:
            return False
        raise ValueError(
            f"{self._folder} holds other figures ({_differences(found, identity)}); "
            "name another folder, or overwrite it (--overwrite)."
        )


def _differences(found: Any, wanted: dict[str, Any]) -> str:
    """Return in words what differs, the first few keys."""
    if not isinstance(found, dict):
        return f"its {IDENTITY} cannot be read"
    keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    shown = []
    for key in keys[:3]:
        before, now = json.dumps(found.get(key)), json.dumps(wanted.get(key))
        same = next((i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), 0)
        shown.append(f"{key}: {_short(before, same)}, now {_short(now, same)}")
    return "; ".join(shown) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _short(text: str, same: int = 0) -> str:
    """Return a text that is cut if it is long, without most of its first `same` characters, which tell nothing."""
    if len(text) > _LONGEST and same > _LONGEST // 2:
        text = "..." + text[same - _LONGEST // 3 :]
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _check_finite(row: Row) -> None:
    """Raise ValueError where a number of the row is nan or infinite."""
    for key, value in row.items():
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            place = _short(json.dumps(dict(list(row.items())[:3])))
            raise ValueError(
                f"{key} of {place} is not finite, so the model gave no usable figure there; "
                "try another dtype or backend."
            ) from None


def _read(path: Path) -> list[Row]:
    """Return the complete rows of a file; a last line that was cut off is none."""
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is nothing, or cut off
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is damaged; delete that line to have it measured again.")
        rows.append(row)
    return rows


def _cut_torn_line(path: Path) -> None:
    """Take away what follows the last newline: a write that was cut off."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _lines(rows: Iterable[Any], indent: int | None = None) -> bytes:
    return "".join(json.dumps(row, indent=indent) + "\n" for row in rows).encode()
