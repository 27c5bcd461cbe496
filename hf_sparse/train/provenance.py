"""Where a trained model comes from, as others may read it: names without a path of this machine, licence, versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache

from .. import __version__
from ..evaluate.machine import PACKAGES
from .config import AdaptationArguments

_LISTED = 10  # texts that are named; of more, the number is given
_LICENSE = ("license", "license_name", "license_link")


def shown(name: str) -> str:
    """Return a hub id or a path below the working folder as it is, of any other path the last name."""
    parts = Path(name).parts  # none in "."
    below = parts and not os.path.isabs(name) and ".." not in parts
    return name if below else os.path.basename(os.path.abspath(name))


def hub_id(name: str) -> str | None:
    """Return the name where it is that of something on the hub, None where it is a folder here."""
    return None if not name or os.path.isabs(name) or os.path.exists(name) else name


def license_of(base: str) -> dict[str, Any]:
    """Return the licence as the base model's own card has it, nothing where there is no card here that says."""
    if os.path.isdir(base):
        path: object = os.path.join(base, "README.md")
    else:
        path = try_to_load_from_cache(base, "README.md")
    if not isinstance(path, str) or not os.path.isfile(path):
        return {}
    try:
        text = Path(path).read_text(encoding="utf-8")
        known = ModelCard(text, ignore_metadata_errors=True).data.to_dict() if text.startswith("---") else {}
    except (ValueError, OSError, yaml.YAMLError):  # the card of somebody else is no reason to fail
        return {}
    return {key: known[key] for key in _LICENSE if isinstance(known.get(key), str)}


def texts_of(arguments: AdaptationArguments) -> str:
    """Return what a model was trained on, in words."""
    if arguments.dataset is None:
        return _texts(arguments.text, "train")
    parts = [
        f"`{shown(arguments.dataset)}`",
        arguments.dataset_config or "",
        f"{arguments.split or 'train'} split",
    ]
    return "the dataset " + ", ".join(filter(None, parts))


def eval_texts_of(arguments: AdaptationArguments, documents: int) -> str:
    """Return what it was measured on, so many documents, in words."""
    held_out = "1 held-out document" if documents == 1 else f"{documents:,} held-out documents"
    return f"{held_out} of {_texts(arguments.eval_text, 'validation')}"


def versions() -> str:
    """Return the versions of what trains, in one line."""
    found = {"hf_sparse": __version__, "python": platform.python_version()}
    found |= {name: metadata.version(name) for name in PACKAGES}
    return ", ".join(f"{name} {version}" for name, version in found.items())


def listed(names: Iterable[str]) -> str:
    """Return the names in one line, the first of many and their number."""
    found = list(names)
    more = f" and {len(found) - _LISTED:,} more" if len(found) > _LISTED else ""
    return ", ".join(f"`{name}`" for name in found[:_LISTED]) + more


def _texts(paths: Iterable[str] | None, split: str) -> str:
    if paths is None:
        return f"the {split} split of the standard library of Python {platform.python_version()}"
    return listed(map(shown, paths))
