"""PATTERN on the command line: a name, a union ``sliding_window|strided``, or the path of a JSON file."""

from __future__ import annotations

import argparse
import difflib
import os
from typing import Any

from ..hf import SparseSettings
from ..hf.stored_settings import settings_from_json
from ..patterns import Pattern, Union, available_patterns, get_pattern
from ..patterns.written import pattern_from_json, read_json_file
from .options import Given, dashed, fields, given_options, owners, read_options

PATTERN_HELP = (
    "a name (see: hf-sparse patterns), a union in quotes such as 'sliding_window|strided', or a JSON file "
    'with a stored pattern such as {"per_head": [...]}; an option goes to every member of a union that has it'
)


def read_patterns(written: list[str], args: argparse.Namespace) -> list[Pattern | SparseSettings]:
    """Return what each PATTERN stands for, in order, with the given options that it has; equal ones once.

    Raises:
        ValueError: an unknown pattern, an option that none of them has, a value that does not fit, or a file that holds
            no pattern.
    """
    given = given_options(args)
    spelled = [None if is_file(text) else _names(text) for text in written]
    named = list(dict.fromkeys(name for names in spelled for name in names or ()))
    for name in named:
        check_known(name)
    known = {option for name in named for option in fields(name)}
    for option, one in given.items():
        if option not in known:
            raise ValueError(_nobody_has(option, one, named, written))
    patterns: list[Pattern | SparseSettings] = []
    for text, names in zip(written, spelled, strict=True):
        patterns.append(read_file(text) if names is None else _build(names, given))
    return list(dict.fromkeys(patterns))


def is_file(text: str) -> bool:
    """True where PATTERN is a path; no name has a dot or a separator in it."""
    return text.lower().endswith(".json") or os.sep in text or "/" in text


def read_file(path: str) -> Pattern | SparseSettings:
    """Return the pattern in a JSON file, or the settings (pattern, layers, backend) where it holds all of them.

    Raises:
        ValueError: a file that cannot be read, or that holds neither.
    """
    saved = read_json_file(path)
    if isinstance(saved, dict) and "sparse_attention" in saved:  # the config.json of a patched model
        saved = saved["sparse_attention"]
    check_stored(saved, f"the pattern file {path}")
    try:
        is_settings = isinstance(saved, dict) and "version" in saved
        return settings_from_json(saved) if is_settings else pattern_from_json(saved)
    except ValueError as error:
        raise ValueError(f"the pattern file {path} holds no usable pattern: {error}") from None


def check_names(args: argparse.Namespace) -> None:
    """Raise ValueError where --pattern or PATTERN names a pattern that is not registered."""
    written = getattr(args, "pattern", [])
    for text in [written] if isinstance(written, str) else written:
        for name in () if is_file(text) else _names(text):
            check_known(name)


def check_known(name: str) -> None:
    """Raise ValueError with the nearest name where no pattern of that name is registered."""
    names = available_patterns()
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else "A pattern of your own needs --plugin FILE.py."
    raise ValueError(f"unknown pattern {name!r}. {hint} Available: {', '.join(names)}.")


def check_stored(saved: Any, where: str) -> None:
    """Raise ValueError where a stored pattern, however nested, names one that is not registered."""
    for name in _stored_names(saved):
        if name not in available_patterns():
            raise ValueError(
                f"{where} names the pattern {name!r}, which this hf_sparse does not have; "
                f"give the file that registers it with --plugin FILE.py"
            )


def _stored_names(saved: Any) -> list[str]:
    if isinstance(saved, list):
        return [name for value in saved for name in _stored_names(value)]
    if not isinstance(saved, dict):
        return []
    own = (
        [saved["name"]] if isinstance(saved.get("name"), str) and saved.keys() <= {"name", "options"} else []
    )
    return own + [name for value in saved.values() for name in _stored_names(value)]


def _names(text: str) -> list[str]:
    """Return the members of a union, one for a plain name."""
    names = [name.strip() for name in text.split("|")]
    if not all(names):
        raise ValueError(
            f"{text!r} names no pattern in one place; write 'sliding_window' or 'sliding_window|strided'"
        )
    return list(dict.fromkeys(names))


def _build(names: list[str], given: dict[str, Given]) -> Pattern:
    members = [get_pattern(name, **read_options(name, given)) for name in names]
    return Union.of(*members) if len(members) > 1 else members[0]


def _nobody_has(option: str, given: Given, names: list[str], written: list[str]) -> str:
    if not names and written:
        return f"{given.flag} goes with a named pattern; write it into the options of {written[0]}"
    if not names:
        return (
            f"{given.flag} is an option of a pattern, and there is no --pattern; "
            f"name one of {', '.join(owners()[option])}"
        )
    known = list(dict.fromkeys(own for name in names for own in fields(name)))
    near = difflib.get_close_matches(option, known, n=1)
    hint = f" did you mean --{dashed(near[0])}?" if near else ""
    all_known = ", ".join(f"--{dashed(own)}" for own in sorted(known)) or "none"
    verb, whose = ("has", "its") if len(names) == 1 else ("have", "their")
    return f"{' and '.join(names)} {verb} no option {given.flag};{hint} {whose} options: {all_known}."
