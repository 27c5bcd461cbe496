"""The file of results: written after every unit, so that an interrupted run keeps what it has."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from dataclasses import replace
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import hf_sparse
from hf_sparse.evaluate.machine import git_revision

from .cases import Case
from .report import markdown
from .suite import Suite, Unit
from .task import Task

PACKAGES = ("torch", "transformers", "triton", "local-attention", "numpy")
KEY = (
    "measure",
    "length",
    "causal",
    "heads",
    "kv_heads",
    "head_dim",
    "dtype",
    "graphed",
    "pattern",
    "method",
)


class Results:
    """Rows of one kind of device, in ``<device>.json`` and ``<device>.md``.

    Rows of an earlier run stay where it ran on the same machine with the same versions; a row of the same cell and
    method takes the place of the old one. Rows of another machine or other versions are dropped, since no table may mix
    them; `dropped` counts them. Each row carries the date, the git revision, and a checksum of the code it measured.
    """

    def __init__(self, suite: Suite, command: str) -> None:
        self.path = suite.output / f"{slug(suite.shape.device)}.json"
        self.command = command
        self.machine = machine(suite.shape.device)
        self.revision = git_revision()
        self.code = checksum()
        self.rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.not_run: list[dict[str, Any]] = []
        self.dropped = 0
        old = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {"rows": []}
        if old.get("machine") == self.machine:
            self.rows = {_key(row): row for row in old["rows"]}
        else:
            self.dropped = len(old["rows"])

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Put rows in, and write everything, marked as partial."""
        for row in rows:
            self.rows[_key(row)] = row | {
                "date": date.today().isoformat(),
                "revision": self.revision,
                "code": self.code,
            }
        self.write(partial=True)

    def missing(self, unit: Unit, suite: Suite) -> Unit | None:
        """Return the unit without the patterns that this code has measured; None where nothing is left.

        What failed of ours is tried again; a peer's reason stands.
        """
        own = [
            row
            for row in self.rows.values()
            if row.get("code") == self.code
            and not ("error" in row and row["method"].startswith("hf_sparse"))
            and row["measure"].split("_")[0] == unit.measure
            and (row["length"], row["causal"], row["graphed"]) == (unit.length, unit.causal, unit.graphed)
            # A whole model has heads of its own.
            and (unit.measure == "prefill" or _shape_of(row) == _shape_of(suite.shape.described))
        ]
        found = {(row["pattern"], row["method"]) for row in own}
        left = tuple(case for case in unit.cases if not found >= _wanted(case, unit, suite))
        return replace(unit, cases=left) if left else None

    def skip(self, what: str, reason: str) -> None:
        """Note a part of this run that was not measured."""
        self.not_run.append({"what": what, "reason": reason})
        self.write(partial=True)

    def write(self, *, partial: bool) -> None:
        """Write both files; each appears whole or not at all."""
        record = {
            "version": 1,
            "partial": partial or bool(self.not_run),
            "command": self.command,
            "date": date.today().isoformat(),
            "machine": self.machine,
            "not_run": self.not_run,
            "rows": list(self.rows.values()),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _write(self.path, json.dumps(record, indent=1) + "\n")
        _write(self.path.with_suffix(".md"), markdown(record))


def _wanted(case: Case, unit: Unit, suite: Suite) -> set[tuple[str, str]]:
    """Return pattern and method of the rows that a case has when it is done."""
    names = {"hf_sparse" if name == "auto" else f"hf_sparse, {name}" for name in suite.backends}
    if unit.measure == "prefill":
        names = {"hf_sparse"}
    if unit.with_peers:
        task = Task(case, unit.length, suite.shape)
        names |= {peer.name for peer in suite.peers if peer.applies(task)}
    return {(case.label, name) for name in names}


def _shape_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["heads"], row["kv_heads"], row["head_dim"], row["dtype"]


def checksum() -> str:
    """Return twelve digits that change with the library's code, also outside git."""
    folder = Path(hf_sparse.__file__).parent
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def slug(device: torch.device) -> str:
    """Return "cpu", or the GPU's name in lower case with hyphens."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the numbers depend on besides the code: processor, threads, versions."""
    versions = {"hf_sparse": hf_sparse.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__  # with its build, such as +cpu or +cu130
    found: dict[str, Any] = {"processor": _processor(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found | {"versions": versions}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
