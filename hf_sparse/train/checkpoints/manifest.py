"""What a checkpoint says of itself: its files with their sizes and hashes, and what it was trained with."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ...hf.atomic_file import write_atomically

MANIFEST = "complete.json"  # written last
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib")


def write_manifest(folder: Path, trained_with: dict[str, Any], engine: str | None) -> None:
    """Put every file of the folder on disk, then the manifest that makes a checkpoint of it.

    Args:
        engine: "deepspeed" or "fsdp" where these wrote files of their own, which are not safe to read.
    """
    files = {}
    for name, path in _files(folder).items():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    content = {"engine": engine, "files": files, "trained_with": trained_with}
    content["sha256"] = _own_hash(content)
    write_atomically(folder / MANIFEST, json.dumps(content, indent=2).encode())
    for place in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync_folder(place)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest, None where it is missing or damaged."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.pop("sha256", None) != _own_hash(content):
        return None
    return content if {"engine", "files", "trained_with"} <= content.keys() else None


def find_flaw(folder: Path) -> str | None:
    """Return what is missing from a checkpoint or damaged, None for a whole one."""
    if (manifest := read_manifest(folder)) is None:
        return f"it has no readable {MANIFEST}, so it was not written to its end"
    present = _files(folder)
    for name, want in manifest["files"].items():
        if name not in present:
            return f"{name} is missing"
        size = present[name].stat().st_size
        if size != want["bytes"]:
            return f"{name} has {size} bytes instead of {want['bytes']}"
    for name, want in manifest["files"].items():
        if _sha256(present[name]) != want["sha256"]:
            return f"{name} is not as it was written"
    return None


def refuse_foreign(folder: Path, *, trust_engine_state: bool = False) -> None:
    """Refuse a folder with a file that training did not put there, or whose reading might run code.

    Raises:
        ValueError: the file is named.
    """
    manifest = read_manifest(folder)
    engine = manifest["engine"] if manifest else None
    for name, path in sorted(_files(folder).items()):
        plain = path.is_file() and not path.is_symlink()
        if not plain or (manifest and name not in manifest["files"]):
            raise ValueError(
                f"{path} does not belong to its checkpoint; delete that file, or start from another checkpoint."
            )
        if engine is None and _may_run_code(path):
            raise ValueError(
                f"{path} may be a pickle, and reading one runs whatever code is in it; delete the folder, or start "
                "from another checkpoint."
            )
    if engine is not None and not trust_engine_state:
        raise ValueError(
            f"{folder} holds the state that {engine} wrote, in part as pickles, which run whatever code is in them; "
            "only if you wrote this folder yourself, set trust_engine_state=True."
        )


def sync_folder(folder: Path) -> None:
    """Put on disk which files the folder holds; Windows has no such call."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files(folder: Path) -> dict[str, Path]:
    """Return the files of a checkpoint but the manifest, by their path in it; a link counts as a file."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    files.pop(MANIFEST, None)
    return files


def _may_run_code(path: Path) -> bool:
    if path.name.lower().endswith(PICKLED):
        return True
    with path.open("rb") as file:
        start = file.read(9)
    # safetensors may begin like a pickle, with the length of its header; the header then begins at byte 8
    pickled = start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5") and start[8:] != b"{"
    return pickled or start[:4] == b"PK\3\4"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _own_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
