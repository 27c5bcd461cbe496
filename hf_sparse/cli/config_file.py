"""--config FILE.yaml: options of a command from a file, where the command line does not give them."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ..documents import read_text_file
from .options import is_pattern_option
from .values import as_text

_OPTION = "--config"
_LISTS = (argparse._AppendAction, argparse._ExtendAction)


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        _OPTION,
        metavar="FILE.yaml",
        help="read options from this file: their names are its keys (MODEL is model), lists stand for what may be "
        "repeated or has commas, true for what takes no value; an option on the command line replaces the file's, a "
        "list as a whole",
    )


@dataclass(frozen=True)
class ConfigFile:
    """What a file of options holds.

    path: of the file.
    values: what it says, by the name of the option with dashes.
    """

    path: str
    values: dict[str, Any]

    def arguments(self, parser: argparse.ArgumentParser, own: Sequence[str]) -> list[str]:
        """Return the file's options as arguments of a parser, without those that its own arguments give.

        Raises:
            ValueError: an option that the parser does not have, or a value that is none of that option.
        """
        actions = _actions(parser)
        given = _given(parser, own)
        positional: list[str] = []
        options: list[str] = []
        for key, value in self.values.items():
            if key not in actions:
                raise ValueError(f"{self.path} has the unknown option {key!r}; {_hint(key, actions, parser)}")
            action = actions[key]
            try:
                arguments = _spelled(key, action, value)
            except ValueError as error:
                raise ValueError(f"{self.path}: {key} {error}") from None
            if action.dest not in given:
                (options if action.option_strings else positional).extend(arguments)
        return positional + options

    def plugins(self, parser: argparse.ArgumentParser, own: Sequence[str]) -> list[str]:
        """Return the arguments of --plugin alone: its files bring options that the others may name."""
        only = {key: value for key, value in self.values.items() if key == "plugin"}
        return ConfigFile(self.path, only).arguments(parser, own)


def find_config(own: Sequence[str], parser: argparse.ArgumentParser) -> ConfigFile | None:
    """Return the file that --config of a command's own arguments names, None where it stands for something else.

    Args:
        parser: one without arguments; it is given --config.
    Raises:
        ValueError: the file cannot be read, is not YAML, or holds anything but one value for each of some names.
    """
    add_config_argument(parser)
    path = parser.parse_known_args(own)[0].config
    return None if path is None else ConfigFile(path, _read(path))


def _read(path: str) -> dict[str, Any]:
    text = read_text_file(path).text
    try:
        loaded = yaml.safe_load(text)
        node = yaml.compose(text, yaml.SafeLoader)  # of two equal keys, the mapping above only has the last
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{path} is not YAML ({line}{error.problem}); correct it.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a control character, the 32nd of a month
        raise ValueError(f"{path} is no YAML that can be read ({error}); correct it.") from None
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{path} holds no options; write each on a line of its own, such as length: 4096.")
    values: dict[str, Any] = {}
    for key, _ in node.value:
        where = f"{path}, line {key.start_mark.line + 1}:"
        if key.tag != "tag:yaml.org,2002:str":
            raise ValueError(
                f"{where} {key.value!r} is no name of an option; write one such as length: 4096."
            )
        name = key.value.replace("_", "-")
        if name in values:
            raise ValueError(f"{where} {key.value} is given twice; keep one, or write its values as a list.")
        values[name] = loaded[key.value]
    return values


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return what a file may name."""
    found: dict[str, argparse.Action] = {}
    for action in parser._actions:
        flags = [flag for flag in action.option_strings if flag.startswith("--")]
        if isinstance(action, argparse.BooleanOptionalAction):
            flags = [flag for flag in flags if not flag.startswith("--no-")]  # what false stands for
        names = [flag.removeprefix("--") for flag in flags] or [action.dest.replace("_", "-")]
        found.update((name, action) for name in names if f"--{name}" not in ("--help", _OPTION))
    return found


def _given(parser: argparse.ArgumentParser, own: Sequence[str]) -> set[str]:
    """Return where the parser would store what its own arguments give."""
    # Defaults go only where the namespace has nothing, so None stands for what is not given.
    namespace = argparse.Namespace(**{action.dest: None for action in parser._actions})
    required = [action for action in parser._actions if action.required]
    for action in required:
        action.required = False
    try:
        parsed, _ = parser.parse_known_args(own, namespace)
    finally:
        for action in required:
            action.required = True
    return {name for name, value in vars(parsed).items() if value is not None}


def _hint(key: str, actions: dict[str, argparse.Action], parser: argparse.ArgumentParser) -> str:
    near = difflib.get_close_matches(key, actions, n=1)
    return f"did you mean {near[0]!r}?" if near else f"see: {parser.prog} --help"


def _spelled(key: str, action: argparse.Action, value: Any) -> list[str]:
    """Return an option and its value as arguments.

    Raises:
        ValueError: what the value must be instead, without the name of the option.
    """
    if action.nargs == 0:
        return _switch(key, action, value)
    several = isinstance(action, _LISTS) or action.nargs in ("+", "*")
    if is_pattern_option(action):
        texts = [_pattern_text(value)]
    elif several:
        texts = [_text(action, item) for item in (value if isinstance(value, list) else [value])]
        if not texts:
            raise ValueError("is an empty list; leave it out, or name at least one")
    elif isinstance(value, list) and action.type not in (None, int, float):  # 512,1024 is one value
        texts = [",".join(_text(action, item) for item in value)]
    else:
        texts = [_text(action, value)]
    if not action.option_strings:
        return texts
    flag = f"--{key}"
    if several and not isinstance(action, _LISTS):
        return [flag, *texts]
    return [f"{flag}={text}" for text in texts]  # joined, or a text like -1 would be taken for an option


def _switch(key: str, action: argparse.Action, value: Any) -> list[str]:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, got {value!r}")
    off = [f"--no-{key}"] if isinstance(action, argparse.BooleanOptionalAction) else []
    return [f"--{key}"] if value else off


def _text(action: argparse.Action, value: Any) -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if action.type is int:
        fits, wanted = number and isinstance(value, int), "a whole number"
    elif action.type is float:
        fits, wanted = number or _is_float(value), "a number"
    elif action.type is None:
        fits, wanted = isinstance(value, str), "a text (in quotes, where YAML takes it for something else)"
    else:
        fits, wanted = number or isinstance(value, str), "one value"
    if not fits:
        raise ValueError(f"must be {wanted}, got {value!r}")
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"must be one of {', '.join(map(str, action.choices))}, got {value!r}")
    return str(value)


def _is_float(value: Any) -> bool:
    """True for a text such as 1e-4, which YAML does not take for a number."""
    try:
        float(value)
    except (ValueError, TypeError):
        return False
    return isinstance(value, str)


def _pattern_text(value: Any) -> str:
    """Return a pattern's option as the command line spells it: 256,512 for a list, 1,2;3 for one of lists."""
    if isinstance(value, list):
        separator = ";" if any(isinstance(item, list) for item in value) else ","
        end = separator if len(value) == 1 else ""  # "256," is a list of one, 256 a number
        return separator.join(map(_pattern_item, value)) + end
    return _pattern_item(value)


def _pattern_item(value: Any) -> str:
    items = value if isinstance(value, list) else [value]
    if not all(item is None or isinstance(item, (bool, int, float, str)) for item in items):
        raise ValueError(f"must be a value, a list, or a list of lists, got {value!r}")
    return ",".join(map(as_text, items))
