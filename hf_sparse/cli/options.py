"""Pattern options on the command line, read off the fields of every registered pattern."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any

from ..patterns import Pattern, available_patterns, pattern_class
from .values import as_text, can_be_written, read_value

_DEST = "pattern_option_"
_FLAGS = "pattern_option_flags"
JSON_FILE = "(JSON file)"


@dataclasses.dataclass(frozen=True)
class Given:
    """One pattern option of the command line: how it is spelled there, and the text after it."""

    flag: str
    text: str


def add_pattern_options(parser: argparse.ArgumentParser) -> None:
    """Give the parser one option per field of a registered pattern: ``--window``, ``--global-tokens``, ...

    Call this after the command's own options: where a name is taken, the pattern's is spelled ``--pattern-<name>``.
    """
    group = parser.add_argument_group(
        "pattern options",
        "Each goes to every named pattern that has it. Lists are separated by commas (256,512), lists of lists by "
        "semicolons, and none stands for no value.",
    )
    flags = {}
    for option, patterns in owners().items():
        shown = [f"{name}: {_default_text(name, option)}" for name in patterns]
        flags[option] = _add(group, option, f"of {'; '.join(shown)}")
    parser.set_defaults(**{_FLAGS: flags})


def _add(group: Any, option: str, text: str) -> str:
    prefix = "--"
    while True:
        flag = prefix + dashed(option)
        try:
            group.add_argument(flag, dest=_DEST + option, metavar="VALUE", help=text.replace("%", "%%"))
            return flag
        except argparse.ArgumentError:  # the command has an option of this name
            prefix += "pattern-"


def given_options(args: argparse.Namespace) -> dict[str, Given]:
    """Return the pattern options that were given, by the name of the field."""
    texts = {flag: getattr(args, _DEST + flag) for flag in getattr(args, _FLAGS)}
    return {
        name: Given(getattr(args, _FLAGS)[name], text) for name, text in texts.items() if text is not None
    }


def is_pattern_option(action: argparse.Action) -> bool:
    """True for what `add_pattern_options` gave a parser."""
    return action.dest.startswith(_DEST)


def read_options(name: str, given: dict[str, Given]) -> dict[str, Any]:
    """Return the values of those given options that the pattern of that name has.

    Raises:
        ValueError: a value that is not what the field's annotation says, or a field that text cannot spell.
    """
    values = {}
    for option in fields(name):
        if option not in given:
            continue
        flag, hint = given[option].flag, _hints(name)[option]
        if not can_be_written(hint):
            raise ValueError(
                f"{flag} of {name} cannot be written on the command line; put the pattern into a JSON file, "
                f'{{"name": "{name}", "options": {{"{option}": ...}}}}, and give its path as the pattern'
            )
        values[option] = read_value(flag, given[option].text, hint)
    return values


def options_text(name: str) -> str:
    """Return the options of a pattern with their defaults, spelled as on the command line."""
    return " ".join(f"--{dashed(option)} {_default_text(name, option)}" for option in fields(name))


def owners() -> dict[str, list[str]]:
    """Return each option with the patterns that have it, both in alphabetical order of the patterns."""
    found: dict[str, list[str]] = {}
    for name in available_patterns():
        for option in fields(name):
            found.setdefault(option, []).append(name)
    return found


def fields(name: str) -> list[str]:
    """Return the options of the pattern of that name."""
    return [field.name for field in dataclasses.fields(pattern_class(name)) if field.init]


def dashed(option: str) -> str:
    return option.replace("_", "-")


def _hints(name: str) -> dict[str, Any]:
    """Return what each field is annotated with; `object` where an annotation names what is not there at run time."""
    cls: type[Pattern] = pattern_class(name)
    try:
        return typing.get_type_hints(cls)
    except (NameError, AttributeError, TypeError, SyntaxError):
        return dict.fromkeys(fields(name), object)


def _default_text(name: str, option: str) -> str:
    if not can_be_written(_hints(name)[option]):
        return JSON_FILE
    field = next(field for field in dataclasses.fields(pattern_class(name)) if field.name == option)
    if field.default_factory is not dataclasses.MISSING:
        return as_text(field.default_factory())
    return "(required)" if field.default is dataclasses.MISSING else as_text(field.default)
