"""Patterns as plain JSON: ``{name, options}``, ``{union: [...]}``, ``{per_head: ...}``, ``{per_layer: ...}``, nested.

A long list per head or layer is written as its distinct patterns and, for each head or layer, the number of its own:
``{"per_head": {"patterns": [...], "heads": [0, 0, 0, 1]}}``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .algebra import PerHead, PerLayer, Union
from .base import Pattern
from .registry import get_pattern, pattern_class


def pattern_to_json(pattern: Pattern) -> dict[str, Any]:
    """Return the pattern as plain JSON values that `pattern_from_json` reads back.

    Raises:
        ValueError: a pattern in it is not registered, or not under its own class.
    """
    if isinstance(pattern, Union):
        return {"union": [pattern_to_json(member) for member in pattern.members]}
    if isinstance(pattern, PerHead):
        return {"per_head": _list_to_json(pattern.patterns, "heads")}
    if isinstance(pattern, PerLayer):
        return {"per_layer": _list_to_json(pattern.patterns, "layers")}
    # A subclass inherits the name of what it derives from, and would come back as that.
    if not pattern.name or pattern_class(pattern.name) is not type(pattern):
        raise ValueError(
            f"{type(pattern).__name__} has no name of its own to be saved under; decorate it with "
            f"@hf_sparse.register_pattern('a_name')"
        )
    return {"name": pattern.name, "options": pattern.options()}


def pattern_from_json(saved: Any) -> Pattern:
    """Return the pattern that was written.

    Raises:
        ValueError: not what `pattern_to_json` writes, a pattern this installation does not know, or options that the
            pattern refuses.
    """
    if isinstance(saved, dict) and len(saved) == 1:
        ((kind, value),) = saved.items()
        if kind == "union" and isinstance(value, (list, tuple)) and value:
            return Union.of(*(pattern_from_json(member) for member in value))
        if kind == "per_head":
            return PerHead(_list_from_json(saved, value, "heads"))
        if kind == "per_layer":
            return PerLayer(_list_from_json(saved, value, "layers"))
    if not isinstance(saved, dict) or "name" not in saved or not saved.keys() <= {"name", "options"}:
        raise ValueError(
            f"a saved pattern must be {{name, options}}, {{union}}, {{per_head}} or {{per_layer}}, got "
            f"{_short(saved)}; write it with hf_sparse.patterns.pattern_to_json, or patch the model again"
        )
    options = {} if saved.get("options") is None else saved["options"]
    if not isinstance(options, dict):
        raise ValueError(
            f"the options of the saved pattern {saved['name']!r} must be a dict, got {_short(options)}; "
            f'write them as {{"window": 128}}, or patch the model again'
        )
    return get_pattern(saved["name"], **{name: _frozen(value) for name, value in options.items()})


def as_pattern(option: str, value: Any) -> Pattern:
    """Return the pattern that `value` is, names or holds as JSON; raise ValueError where it does neither."""
    if isinstance(value, (str, Pattern)):
        return get_pattern(value)
    if isinstance(value, Mapping):
        return pattern_from_json(dict(value))
    raise ValueError(f"{option} must hold patterns or their names, got {_short(value)}")


def read_json_file(path: str) -> Any:
    """Return what the JSON file of a pattern holds; raise ValueError where it cannot be read."""
    if "\0" in path:
        raise ValueError(f"{path!r} is no file name, it holds a null byte; check the spelling")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"the pattern file {path} cannot be read ({os.strerror(error.errno or 0)}); check the path"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"the pattern file {path} is not JSON ({error}); write a pattern such as "
            '{"name": "sliding_window", "options": {"window": 256}}'
        ) from None


def _list_to_json(patterns: Sequence[Pattern], per: str) -> Any:
    distinct = list(dict.fromkeys(patterns))
    if len(distinct) == len(patterns):
        return [pattern_to_json(pattern) for pattern in patterns]
    return {
        "patterns": [pattern_to_json(pattern) for pattern in distinct],
        per: [distinct.index(pattern) for pattern in patterns],
    }


def _list_from_json(saved: dict[str, Any], value: Any, per: str) -> tuple[Pattern, ...]:
    if isinstance(value, (list, tuple)) and value:
        return tuple(pattern_from_json(pattern) for pattern in value)
    if isinstance(value, dict) and value.keys() == {"patterns", per}:
        listed, numbers = value["patterns"], value[per]
        if isinstance(listed, (list, tuple)) and isinstance(numbers, (list, tuple)) and numbers:
            patterns = [pattern_from_json(pattern) for pattern in listed]
            if all(type(number) is int and 0 <= number < len(patterns) for number in numbers):
                return tuple(patterns[number] for number in numbers)
    raise ValueError(
        f"a saved pattern per head or layer must be a list of patterns, or {{patterns, {per}}} with numbers into that "
        f"list, got {_short(saved)}; write one pattern for each, or patch the "
        f"model again"
    )


def _short(value: Any) -> str:
    """Return how a value is written, cut where that is long: files of something else are."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value
