"""Several needles in a haystack, one is asked for (RULER's ``niah_multikey``, arXiv:2404.06654)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import DepthProbe, Told, check_choice, check_count
from .drawing import MOST_DIGITS, NAMES, VALUES
from .needle import WORDINGS, ask_for_first


@dataclass(frozen=True)
class NeedleMultikey(DepthProbe):
    """Values under several names; the one asked for lies at the depth, the others anywhere.

    keys: names in the haystack, the one asked for included.
    values: "numbers" or "uuids"; digits: of the numbers.
    wording: "code" writes ``copper_ladder = 4821390``, "prose" a sentence.
    """

    name: ClassVar[str] = "needle_multikey"

    keys: int = 4
    values: str = "numbers"
    digits: int = 7
    wording: str = "code"

    def __post_init__(self) -> None:
        check_choice("values", self.values, VALUES)
        check_count("digits", self.digits, 1, MOST_DIGITS)
        check_count("keys", self.keys, 2, min(NAMES, 9 * 10 ** (self.digits - 1)))
        check_choice("wording", self.wording, WORDINGS)

    def tell(self, depth: float, draw: np.random.Generator) -> Told:
        return ask_for_first(self.keys, self.values, self.digits, self.wording, depth, draw)

    def chance(self, material: object) -> float:
        """One of the values in the haystack, whichever."""
        return 1 / self.keys
