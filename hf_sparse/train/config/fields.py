"""What every section of the settings is made of: a field with its help, and the checks that several share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def option(default: Any, help: str) -> Any:
    """Return a dataclass field with the text that ``--help`` shows for it."""
    return field(default=default, metadata={"help": help})


@dataclass
class Section:
    """Some of the settings of an adaptation; each section checks its own in ``__post_init__``, then calls the next."""

    def __post_init__(self) -> None: ...


def check_least(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}.")


def check_share(name: str, value: Any, *, most: float = 1.0) -> None:
    """Raise ValueError unless the value lies in (0, most]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= most:
        raise ValueError(f"{name} must be above 0 and at most {most:g}, got {value!r}.")


def check_weight(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < float("inf"):
        raise ValueError(f"{name} must be a number >= 0, got {value!r}; 0 leaves it out.")


def check_filled(name: str, value: list[Any] | None) -> None:
    if value == []:
        raise ValueError(f"{name} is an empty list; name at least one, or leave it out for the default.")
