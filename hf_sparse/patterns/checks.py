"""What options must be: each check raises a ValueError that names the option, the value got and the cure."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

LARGEST_SEED = 2**63 - 1
LARGEST = 2**40  # tokens; positions and their sums and products with a stride stay within int64


def check_count(name: str, value: Any, least: int, most: int = LARGEST) -> None:
    """Raise ValueError unless `value` is a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        note = " (1 is the token itself only)" if name == "window" else ""
        raise ValueError(f"{name} must be >= {least}{note}, got {value}")
    if value > most:
        note = ", more than any sequence has tokens" if most == LARGEST else ""
        raise ValueError(f"{name} must be at most {most}{note}, got {value}")


def check_positions(name: str, value: Any) -> tuple[int, ...]:
    """Return `value` as sorted distinct positions; raise ValueError where it is not a list of whole numbers >= 0."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise ValueError(f"{name} must be a list of token positions such as (0, 64), got {value!r}")
    return _whole_numbers(name, value)


def check_token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Return `value` as sorted distinct vocabulary ids; raise ValueError where it is not a list of those."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise ValueError(f"{name} must be a list of vocabulary ids such as (1, 29871), got {value!r}")
    return _whole_numbers(name, value)


def _whole_numbers(name: str, value: Sequence[Any]) -> tuple[int, ...]:
    for number in value:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= LARGEST:
            raise ValueError(f"{name} must hold whole numbers from 0 to {LARGEST}, got {number!r}")
    return tuple(sorted(set(value)))


def check_counts(name: str, value: Any, per: str) -> int | tuple[int, ...]:
    """Return `value` where it is a whole number >= 1, or as a tuple where it is a list with one for each `per`."""
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError(f"{name} must be a whole number or a list with one per {per}, got an empty list")
        for one in value:
            check_count(name, one, 1)
        return tuple(value)
    check_count(name, value, 1)
    return int(value)


def check_list_fits(name: str, value: Sequence[Any], per: str, count: int) -> None:
    """Raise ValueError unless a list of options has one for each of the `count` heads or layers of a model."""
    if len(value) != count:
        raise ValueError(
            f"{name} has {len(value)} entries and the model has {count} {per}s; give one entry per {per}"
        )


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}{hint}")


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_product(names: str, *values: int) -> None:
    """Raise ValueError where the tokens that options span together exceed any sequence."""
    if math.prod(values) > LARGEST:
        raise ValueError(
            f"{names} must be at most {LARGEST}, more than any sequence has tokens, got "
            f"{' * '.join(map(str, values))}; make one smaller"
        )


def check_ratio(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a fraction of all positions, above 0 and at most 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{name} must lie above 0 and be at most 1, got {value!r}")
    if 1 / value > LARGEST:
        raise ValueError(
            f"{name} must be at least 1/{LARGEST}, or no sequence has a second such token, got {value}"
        )


def period_of(ratio: float) -> int:
    """Return the distance between two of the positions that are `ratio` of all: every round(1 / ratio)-th."""
    return round(1 / ratio)
