"""Names and values that samples are about, drawn so that no two are equal."""

from __future__ import annotations

import uuid

import numpy as np

_FIRST = ["amber", "brave", "calm", "copper", "dusty", "golden", "hidden", "ivory", "lunar", "misty"]
_SECOND = ["anchor", "bridge", "candle", "desert", "engine", "garden", "harbor", "island", "kettle", "ladder"]
NAMES = len(_FIRST) * len(_SECOND)
VALUES = ("numbers", "uuids")
MOST_DIGITS = 18  # an int64 holds them


def draw_names(count: int, draw: np.random.Generator) -> list[str]:
    """Return distinct names such as ``copper_ladder``."""
    chosen = draw.choice(NAMES, count, replace=False)
    return [f"{_FIRST[i // len(_SECOND)]}_{_SECOND[i % len(_SECOND)]}" for i in chosen]


def draw_numbers(count: int, digits: int, draw: np.random.Generator) -> list[str]:
    """Return distinct numbers of so many digits, the first one not 0."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[str(draw.integers(10 ** (digits - 1), 10**digits))] = None
    return list(found)


def draw_uuids(count: int, draw: np.random.Generator) -> list[str]:
    """Return random UUIDs."""
    return [str(uuid.UUID(bytes=draw.bytes(16), version=4)) for _ in range(count)]


def draw_letters(count: int, draw: np.random.Generator, size: int = 5) -> list[str]:
    """Return distinct words of random capital letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(map(chr, draw.integers(ord("A"), ord("Z") + 1, size)))] = None
    return list(found)
