"""PATTERN on the command line: a name, a union ``sliding_window|strided``, or the path of a JSON file."""

from __future__ import annotations

import argparse
import difflib
from dataclasses import replace
from typing import Any

from ..hf import SparseSettings
from ..hf.pattern_file import is_pattern_file, is_settings, read_stored, settings_in
from ..patterns import Pattern, Union, available_patterns, get_pattern
from .options import Given, dashed, fields, given_options, owners, read_options

PATTERN_HELP = (
    "a name (see: hf-sparse patterns), a union in quotes such as 'sliding_window|strided', or a JSON file "
    'with a stored pattern such as {"per_head": [...]}; an option goes to every member of a union that has it'
)


def read_patterns(
    written: list[str], args: argparse.Namespace, seq_len: int | None = None
) -> list[Pattern | SparseSettings]:
    """Return what each PATTERN stands for, in order, with the given options that it has; equal ones once.

    Args:
        seq_len: tokens that options which adapt to the length are resolved for; not those of saved settings.
    Raises:
        ValueError: an unknown pattern, an option that none of them has, a value that does not fit, or a file that holds
            no pattern.
    """
    given = given_options(args)
    spelled = [None if is_pattern_file(text) else _names(text) for text in written]
    named = list(dict.fromkeys(name for names in spelled for name in names or ()))
    for name in named:
        check_known(name)
    known = {option for name in named for option in fields(name)}
    for option, one in given.items():
        if option not in known:
            raise ValueError(_nobody_has(option, one, named, written))
    patterns: list[Pattern | SparseSettings] = []
    for text, names in zip(written, spelled, strict=True):
        if names is None:
            patterns.append(read_file(text, seq_len))
        else:
            pattern = _build(names, given)
            patterns.append(pattern if seq_len is None else pattern.resolve(seq_len))
    return list(dict.fromkeys(patterns))


def read_file(path: str, seq_len: int | None = None) -> SparseSettings:
    """Return what a pattern file holds; a pattern without settings is resolved for `seq_len` tokens, if given.

    Raises:
        ValueError: a file that cannot be read, or that holds no pattern.
    """
    stored = read_stored(path)
    check_stored(stored, f"the pattern file {path}")
    settings = settings_in(stored, path)
    if seq_len is None or is_settings(stored):
        return settings
    return replace(settings, pattern=settings.pattern.resolve(seq_len))


def check_names(args: argparse.Namespace) -> None:
    """Raise ValueError where --pattern or PATTERN names a pattern that is not registered."""
    written = getattr(args, "pattern", [])
    for text in [written] if isinstance(written, str) else written:
        for name in () if is_pattern_file(text) else _names(text):
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
