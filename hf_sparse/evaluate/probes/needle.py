"""A needle in a haystack: one value under a random name (RULER's ``niah_single``, arXiv:2404.06654)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import DepthProbe, Told, check_choice, check_count
from .drawing import MOST_DIGITS, VALUES, draw_names, draw_numbers, draw_uuids

WORDINGS = ("code", "prose")


@dataclass(frozen=True)
class Needle(DepthProbe):
    """One value under a name drawn for the sample.

    values: "numbers" or "uuids"; digits: of the numbers.
    wording: "code" writes ``copper_ladder = 4821390``, "prose" a sentence.
    """

    name: ClassVar[str] = "needle"

    values: str = "numbers"
    digits: int = 7
    wording: str = "code"

    def __post_init__(self) -> None:
        check_choice("values", self.values, VALUES)
        check_count("digits", self.digits, 1, MOST_DIGITS)
        check_choice("wording", self.wording, WORDINGS)

    def tell(self, depth: float, draw: np.random.Generator) -> Told:
        return ask_for_first(1, self.values, self.digits, self.wording, depth, draw)

    def chance(self, material: object) -> float:
        return 2.0**-122 if self.values == "uuids" else 1 / (9 * 10 ** (self.digits - 1))


def ask_for_first(
    keys: int, values: str, digits: int, wording: str, depth: float, draw: np.random.Generator
) -> Told:
    """Return a sample with several names and values: the first, at `depth`, is asked for, the others lie anywhere."""
    names = draw_names(keys, draw)
    drawn = draw_uuids(keys, draw) if values == "uuids" else draw_numbers(keys, digits, draw)
    depths = [depth, *draw.random(keys - 1).tolist()]
    written = [f'"{value}"' if values == "uuids" and wording == "code" else value for value in drawn]
    begins = [
        f"\n{name} =" if wording == "code" else f"\nThe magic value of {name} is" for name in names
    ]  # the question, and the fact up to its value
    end = "\n" if wording == "code" else ".\n"
    facts = [f"{begin} {value}{end}" for begin, value in zip(begins, written, strict=True)]
    return Told(list(zip(depths, facts, strict=True)), begins[0], f" {written[0]}")
