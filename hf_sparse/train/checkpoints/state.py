"""State dictionaries as JSON and safetensors: read back, every value has its bits and its type, and no code has run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes


def save_state(folder: Path, name: str, value: Any) -> None:
    """Write dicts, lists, tuples, tensors, numbers and words as ``name.json``, their tensors as ``name.safetensors``.

    Raises:
        ValueError: a value is none of these.
        OSError: such as on a full disk.
    """
    tensors: dict[str, torch.Tensor] = {}
    written = encode(value, tensors, name)
    if tensors:
        # as bytes: a full disk is an OSError then, from any version of safetensors
        (folder / f"{name}.safetensors").write_bytes(tensors_to_bytes(tensors))
    (folder / f"{name}.json").write_text(json.dumps(written), encoding="utf-8")


def load_state(folder: Path, name: str) -> Any:
    """Return what `save_state` wrote, its tensors on the CPU."""
    path = folder / f"{name}.safetensors"
    tensors = tensors_from_bytes(path.read_bytes()) if path.exists() else {}
    return _decode(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")), tensors)


def has_state(folder: Path, name: str) -> bool:
    return (folder / f"{name}.json").exists()


def encode(value: Any, tensors: dict[str, torch.Tensor], where: str) -> Any:
    """Return the value as JSON, in which every object says what it stands for; its tensors are added to `tensors`.

    Raises:
        ValueError: a value that neither JSON nor safetensors hold; `where` says where it was.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [encode(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": encode(list(value), tensors, where)}
    if isinstance(value, dict):  # JSON has words as keys only, an optimizer numbers
        return {"dict": [encode([key, item], tensors, f"{where}[{key!r}]") for key, item in value.items()]}
    if type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided:
        key = str(len(tensors))
        # a copy: safetensors refuses tensors that share memory
        tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": key}
    raise ValueError(f"{where} is a {type(value).__name__}, which neither JSON nor safetensors can hold.")


def _decode(written: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(written, list):
        return [_decode(item, tensors) for item in written]
    if not isinstance(written, dict):
        return written
    ((kind, content),) = written.items()
    if kind == "tensor":
        return tensors[content]
    items = _decode(content, tensors)
    return tuple(items) if kind == "tuple" else dict(items)
