"""What is named with its options in one word: ``name:option=value,option=value``."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from .values import read_value

T = TypeVar("T")


def read_named(text: str, class_of: Callable[[str], type[T]]) -> T:
    """Return the object that ``name`` or ``name:option=value,...`` stands for; the fields of its class are the options.

    Args:
        class_of: gives the dataclass of a name.
    Raises:
        ValueError: an unknown name or option, or a value that is none of the option.
    """
    name, options = split_options(text)
    cls: Any = class_of(name)  # a dataclass, which types cannot say
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    values = {}
    for option, value in options.items():
        if option not in known:
            has = f"its options: {', '.join(known)}" if known else "it has no options"
            raise ValueError(f"'{option}={value}' is no option of {name}; write NAME=VALUE, {has}.")
        values[option] = read_value(f"{option} of {name}", value, hints[option])
    return cls(**values)


def split_options(text: str) -> tuple[str, dict[str, str]]:
    """Return the name and the options, as texts, of ``name`` or ``name:option=value,...``.

    A comma before anything but an option belongs to the value: ``longformer:window=64,global_tokens=0,1``.
    """
    name, _, written = text.partition(":")
    options: dict[str, str] = {}
    option = ""
    for piece in filter(None, written.split(",")):
        own, equals, value = (part.strip() for part in piece.partition("="))
        if equals:
            option = own.replace("-", "_")
            options[option] = value
        elif option:
            options[option] += f",{own}"
        else:
            raise ValueError(f"{own!r} is no option of {name}; write NAME=VALUE.")
    return name.strip(), options
