"""Pattern options on the command line, read off the fields of every registered pattern."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Callable
from typing import Any

from ..patterns import Pattern, available_patterns, get_pattern, pattern_class

_DEST = "pattern_option_"


def add_pattern_options(parser: argparse.ArgumentParser) -> None:
    """Give the parser one option per field of a registered pattern: ``--window``, ``--global-tokens``, ...

    Call this after the command's own options: where a name is taken, the pattern's is spelled ``--pattern-<name>``.
    """
    group = parser.add_argument_group("pattern options")
    for option, patterns in _owners().items():
        shown = [f"{name}: {_as_text(_default(name, option))}" for name in patterns]
        settings: dict[str, Any] = {
            "dest": _DEST + option,
            "metavar": "VALUE",
            "default": None,
            "help": f"of {'; '.join(shown)}".replace("%", "%%"),
        }
        try:
            group.add_argument(f"--{_dashed(option)}", **settings)
        except argparse.ArgumentError:
            group.add_argument(f"--pattern-{_dashed(option)}", **settings)


def read_patterns(names: list[str], args: argparse.Namespace) -> list[Pattern]:
    """Return the named patterns, each with those of the given options that it has; equal ones are named once.

    Raises:
        ValueError: an unknown pattern, an option that none of them has, or a value that does not fit.
    """
    given = {
        name.removeprefix(_DEST): text
        for name, text in vars(args).items()
        if name.startswith(_DEST) and text is not None
    }
    fields = {name: [field.name for field in dataclasses.fields(pattern_class(name))] for name in names}
    for option in given:
        if not any(option in own for own in fields.values()):
            known = sorted({field for own in fields.values() for field in own})
            raise ValueError(_nobody_has(option, names, known))
    patterns = []
    for name, own in fields.items():
        hints = typing.get_type_hints(pattern_class(name))
        options = {o: _convert(f"--{_dashed(o)}", text, hints[o]) for o, text in given.items() if o in own}
        patterns.append(get_pattern(name, **options))
    return patterns


def options_text(name: str) -> str:
    """Return the options of a pattern with their defaults, spelled as on the command line."""
    options = [field.name for field in dataclasses.fields(pattern_class(name))]
    return " ".join(f"--{_dashed(option)} {_as_text(_default(name, option))}" for option in options) or "-"


def _nobody_has(option: str, names: list[str], known: list[str]) -> str:
    flag = f"--{_dashed(option)}"
    if not names:
        owners = ", ".join(_owners()[option])
        return f"{flag} is an option of a pattern, and there is no --pattern; name one of {owners}."
    near = difflib.get_close_matches(option, known, n=1)
    hint = f" did you mean --{_dashed(near[0])}?" if near else ""
    all_known = ", ".join(f"--{_dashed(o)}" for o in known) or "none"
    verb, whose = ("has", "its") if len(names) == 1 else ("have", "their")
    return f"{' and '.join(names)} {verb} no option {flag};{hint} {whose} options: {all_known}."


def _owners() -> dict[str, list[str]]:
    """Return each option with the patterns that have it, both in alphabetical order of the patterns."""
    owners: dict[str, list[str]] = {}
    for name in available_patterns():
        for field in dataclasses.fields(pattern_class(name)):
            owners.setdefault(field.name, []).append(name)
    return owners


def _default(name: str, option: str) -> Any:
    field = next(field for field in dataclasses.fields(pattern_class(name)) if field.name == option)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _as_text(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "(required)"
    if isinstance(value, (tuple, list)):
        return ",".join(map(_as_text, value)) or "''"
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _dashed(option: str) -> str:
    return option.replace("_", "-")


def _convert(flag: str, text: str, hint: Any) -> Any:
    """Return the value that `text` stands for where a field is annotated with `hint`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        choices = [choice for choice in typing.get_args(hint) if choice is not type(None)]
        if text.lower() == "none" and len(choices) < len(typing.get_args(hint)):
            return None
        hint = choices[0]
    if typing.get_origin(hint) in (tuple, list):
        item = typing.get_args(hint)[0]
        return tuple(_convert(flag, part.strip(), item) for part in text.split(",") if part.strip())
    if hint in _READERS:
        read, wanted = _READERS[hint]
        try:
            return read(text)
        except (ValueError, KeyError):
            raise ValueError(f"{flag} must be {wanted}, got {text!r}") from None
    if hint is str or typing.get_origin(hint) is typing.Literal:
        return text
    raise ValueError(
        f"{flag} cannot be given on the command line; use hf_sparse from Python for this option."
    )


_READERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    int: (int, "a whole number"),
    float: (float, "a number"),
    bool: (lambda text: {"true": True, "false": False}[text.lower()], "true or false"),
}
