"""Settings from a YAML file and from the command line, which wins, parsed into dataclasses by transformers' parser."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser


class ConfigParser(HfArgumentParser):
    """HfArgumentParser with ``--config FILE.yaml``, exact names only, and a ValueError of one sentence for mistakes."""

    def __init__(self, dataclass_types: Any, **kwargs: Any) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """Return one object per dataclass, from the file named by ``--config`` and the overrides after it.

        Raises:
            ValueError: no readable YAML mapping in the file, an unknown key, or a value of the wrong type.
        """
        path, overrides = _split_config(argv)
        argv = [*(self._from_yaml(path) if path else []), *overrides]
        *objects, unknown = self.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            name = unknown[0].split("=")[0]
            raise ValueError(f"unknown argument {name!r} on the command line.{self._hint(name.lstrip('-'))}")
        return tuple(objects)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help.")

    def _from_yaml(self, path: str) -> list[str]:
        known = {action.dest for action in self._actions}
        argv: list[str] = []
        for key, value in _read_mapping(path).items():
            if key not in known:
                raise ValueError(f"unknown key {key!r} in {path}.{self._hint(str(key))}")
            if value is None:
                continue
            if isinstance(value, list):
                argv += [f"--{key}", *(str(item) for item in value)]
            else:
                argv.append(f"--{key}={json.dumps(value) if isinstance(value, (dict, bool)) else value}")
        return argv

    def _hint(self, name: str) -> str:
        near = difflib.get_close_matches(name, [action.dest for action in self._actions], n=1)
        return f" Did you mean {near[0]!r}?" if near else " See --help for all names."


def _split_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take ``--config FILE`` or ``--config=FILE`` out of the arguments."""
    path, rest = None, []
    words = iter(argv)
    for word in words:
        if word == "--config":
            path = next(words, None)
            if path is None:
                raise ValueError("--config needs the path of a YAML file after it.")
        elif word.startswith("--config="):
            path = word.removeprefix("--config=")
        else:
            rest.append(word)
    return path, rest


def _read_mapping(path: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the config file {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = f" (line {mark.line + 1})" if (mark := getattr(error, "problem_mark", None)) else ""
        raise ValueError(f"the config file {path} is not valid YAML{where}.") from None
    if not isinstance(settings, dict):
        raise ValueError(
            f"the config file {path} must hold 'key: value' lines, got {type(settings).__name__}."
        )
    return settings
