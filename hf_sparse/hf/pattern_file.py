"""Pattern files: the JSON of a pattern, or of all settings of a patched model, which stands wherever a pattern does."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ..patterns import Pattern, PerHead, PerLayer, get_pattern
from ..patterns.written import pattern_from_json, read_json_file
from .atomic_file import write_atomically
from .stored_settings import (
    SparseSettings,
    check_comes_back,
    layer_count,
    query_heads,
    settings_from_json,
    settings_to_json,
)


def load_pattern(path: str | os.PathLike[str]) -> Pattern:
    """Return the pattern in a file that `save_pattern`, ``hf-sparse calibrate`` or save_pretrained wrote, or a person.

    `patch_model` takes the path as well, and with it the layers and the backend in it.

    Raises:
        ValueError: a file that cannot be read, holds no pattern, or puts its pattern into some layers alone.
    """
    settings = settings_of(Path(path))
    if settings.layers is not None:
        raise ValueError(
            f"the pattern file {os.fspath(path)} has its pattern in layers {list(settings.layers)} alone, which a "
            "pattern does not say; give the path itself to patch_model"
        )
    return settings.pattern


def save_pattern(pattern: str | Pattern | SparseSettings, path: str | os.PathLike[str]) -> Path:
    """Write a pattern, or settings with their layers and backend, to a file, whole or not at all; return its path.

    Raises:
        ValueError: a pattern that JSON cannot hold.
        OSError: the file cannot be written.
    """
    settings = settings_of(pattern)
    check_comes_back(settings)
    path = Path(path)
    write_atomically(path, (json.dumps(settings_to_json(settings), indent=1) + "\n").encode())
    return path


def is_pattern_file(pattern: object) -> bool:
    """True for the path of a pattern file; no name of a pattern has a dot or a separator in it."""
    if isinstance(pattern, str):
        return pattern.lower().endswith(".json") or os.sep in pattern or "/" in pattern
    return isinstance(pattern, os.PathLike)


def settings_of(pattern: str | os.PathLike[str] | Pattern | SparseSettings, **options: Any) -> SparseSettings:
    """Return the settings that a name with its options, a pattern or a path stands for; settings are as they are.

    Raises:
        ValueError: an unknown name or option, options besides anything but a name, or a file without a pattern.
    """
    if isinstance(pattern, SparseSettings):
        settings = pattern
    elif not isinstance(pattern, Pattern) and is_pattern_file(pattern):
        path = os.fspath(pattern)
        settings = settings_in(read_stored(path), path)
    else:
        # any other path is that of a pattern file; get_pattern refuses what is neither
        return SparseSettings(get_pattern(cast("str | Pattern", pattern), **options))
    if options:
        get_pattern(settings.pattern, **options)  # refuses them
    return settings


def read_stored(path: str) -> Any:
    """Return the JSON of a pattern file; of the config.json of a patched model, the part that is its settings.

    Raises:
        ValueError: a file that cannot be read.
    """
    stored = read_json_file(path)
    return stored["sparse_attention"] if isinstance(stored, dict) and "sparse_attention" in stored else stored


def settings_in(stored: Any, path: str) -> SparseSettings:
    """Return what the JSON of a pattern file says, with the path as its source; raise ValueError for anything else."""
    try:
        if is_settings(stored):
            return replace(settings_from_json(stored), source=path)
        return SparseSettings(pattern_from_json(stored), source=path)
    except ValueError as error:
        raise ValueError(f"the pattern file {path} holds no usable pattern: {error}") from None


def is_settings(stored: Any) -> bool:
    """True for the JSON of whole settings, False for that of a pattern."""
    return isinstance(stored, dict) and "version" in stored


@contextmanager
def naming_its_file(settings: SparseSettings, base: Any) -> Iterator[None]:
    """Let a ValueError raised inside the block name the file of the settings, what it is for and what `base` has."""
    try:
        yield
    except ValueError as error:
        if settings.source is None:
            raise
        name, config = type(base).__name__, base.config.get_text_config()
        own = layer_count(config), query_heads(config)
        wanted = _made_for(settings.pattern)
        if all(count in (None, has) for count, has in zip(wanted, own, strict=True)):
            raise ValueError(f"the pattern file {settings.source} does not fit {name}: {error}") from None
        raise ValueError(
            f"the pattern file {settings.source} was made for {_counted(*wanted)}, and {name} has {_counted(*own)}; "
            "give a file made for this model (hf-sparse calibrate makes one)"
        ) from None


def _made_for(pattern: Pattern) -> tuple[int | None, int | None]:
    """Return the layers and the query heads that a pattern has entries for, None where it fits any number."""
    layers = len(pattern.patterns) if isinstance(pattern, PerLayer) else None
    heads = len(pattern.patterns) if isinstance(pattern, PerHead) else None
    for member in pattern.members:
        own = _made_for(member)
        layers, heads = layers or own[0], heads or own[1]
    return layers, heads


def _counted(layers: int | None, heads: int | None) -> str:
    counts = [
        f"{count} {name}{'' if count == 1 else 's'}"
        for count, name in ((layers, "layer"), (heads, "query head"))
        if count
    ]
    return " of ".join(counts)
