"""Values of options from text, as the option's annotation asks: ``256``, ``256,512``, ``1,2;3``, ``none``, ``true``."""

from __future__ import annotations

import collections.abc
import types
import typing
from collections.abc import Callable
from typing import Any

_SEQUENCES = (tuple, list, collections.abc.Sequence, collections.abc.Iterable)
_SCALARS: dict[Any, tuple[Callable[[str], Any], str, str]] = {
    int: (int, "a whole number", "whole numbers"),
    float: (float, "a number", "numbers"),
    bool: (
        lambda text: {"true": True, "false": False}[text.lower()],
        "true or false",
        "true or false values",
    ),
    str: (str, "a word", "words"),
}
_STRICTEST_FIRST = (bool, int, float, str)


def read_value(flag: str, text: str, hint: Any) -> Any:
    """Return the value that `text` stands for in an option annotated with `hint`; lists become tuples.

    Raises:
        ValueError: `text` is no such value; names `flag`, what it must be, and `text`.
    """
    try:
        return _read(text.strip(), hint)
    except (ValueError, KeyError):
        raise ValueError(f"{flag} must be {_wanted(hint)}, got {text!r}") from None


def can_be_written(hint: Any, depth: int = 0) -> bool:
    """True where a value of the annotated type can be spelled as text; mappings and patterns, for one, cannot."""
    hint = _plain(hint)
    if choices := _choices(hint):
        return any(can_be_written(choice, depth) for choice in choices if choice is not types.NoneType)
    if items := _items(hint):
        return depth < 2 and all(can_be_written(item, depth + 1) for item in items)
    return hint in _SCALARS or hint is types.NoneType or typing.get_origin(hint) is typing.Literal


def as_text(value: Any) -> str:
    """Return a value as it is spelled on the command line."""
    if isinstance(value, (tuple, list)):
        nested = any(isinstance(item, (tuple, list)) for item in value)
        return (";" if nested else ",").join(map(as_text, value)) or "''"
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _read(text: str, hint: Any) -> Any:
    hint = _plain(hint)
    if choices := _choices(hint):
        for choice in sorted(choices, key=lambda choice: _rank(text, choice)):
            try:
                return _read(text, choice)
            except (ValueError, KeyError):
                continue
        raise ValueError(text)
    if hint is types.NoneType:
        return {"none": None, "null": None}[text.lower()]
    if typing.get_origin(hint) is typing.Literal:
        return {as_text(choice): choice for choice in typing.get_args(hint)}[text]
    if items := _items(hint):
        return _read_list(text, hint, items)
    if hint not in _SCALARS:
        raise ValueError(text)
    return _SCALARS[hint][0](text)


def _read_list(text: str, hint: Any, items: tuple[Any, ...]) -> tuple[Any, ...]:
    separator = ";" if any(map(_holds_list, items)) else ","
    pieces = [piece.strip() for piece in text.split(separator)]
    if not pieces[-1]:  # nothing at all, or a comma at the end: "256," is a list of one
        pieces.pop()
    wanted = list(items) if _is_fixed(hint) else list(items[:1]) * len(pieces)
    if len(pieces) != len(wanted) or not all(pieces):
        raise ValueError(text)
    return tuple(_read(piece, item) for piece, item in zip(pieces, wanted, strict=True))


def _rank(text: str, hint: Any) -> tuple[bool, int]:
    """Order the choices of a union: the one that takes the fewest texts first, a list early where there are commas."""
    hint = _plain(hint)
    if _items(hint):
        return ("," not in text and ";" not in text), 0
    return False, _STRICTEST_FIRST.index(hint) if hint in _STRICTEST_FIRST else -1


def _wanted(hint: Any) -> str:
    hint = _plain(hint)
    if choices := _choices(hint):
        return " or ".join(_wanted(choice) for choice in choices if can_be_written(choice))
    if hint is types.NoneType:
        return "none"
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(hint))
    if items := _items(hint):
        count = f"{len(items)} " if _is_fixed(hint) else ""
        if any(map(_holds_list, items)):
            return f"{count}lists separated by semicolons such as 1,2;3,4"
        one_kind = set(items) if len(set(items)) == 1 else {object}
        name = next((_SCALARS[kind][2] for kind in one_kind if kind in _SCALARS), "")
        return f"{count}{name} separated by commas" if name else f"{count}values separated by commas"
    return _SCALARS[hint][1]


def _plain(hint: Any) -> Any:
    """Return what an alias (``type Positions = ...``) stands for, and None's type for None."""
    while hasattr(hint, "__value__"):
        hint = hint.__value__
    return types.NoneType if hint is None else hint


def _choices(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else ()


def _items(hint: Any) -> tuple[Any, ...]:
    """Return the types of a list's items, one for lists of any length; () where the hint is no list."""
    if (typing.get_origin(hint) or hint) not in _SEQUENCES:
        return ()
    return tuple(item for item in typing.get_args(hint) if item is not Ellipsis) or (int | float | str,)


def _is_fixed(hint: Any) -> bool:
    """True for ``tuple[int, int]``, which has one item of each type."""
    return typing.get_origin(hint) is tuple and Ellipsis not in typing.get_args(hint)


def _holds_list(hint: Any) -> bool:
    hint = _plain(hint)
    return bool(_items(hint)) or any(_items(_plain(choice)) for choice in _choices(hint))
