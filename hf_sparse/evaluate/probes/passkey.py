"""Passkey retrieval (Mohtashami & Jaggi, 2023, arXiv:2305.16300): one number hidden in a text, asked for at its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import DepthProbe, Told, check_choice, check_count
from .drawing import MOST_DIGITS, draw_numbers

_FACT = {
    "code": "\nPASS_KEY = {key}\n",
    "prose": "\nThe pass key is {key}. Remember it. {key} is the pass key.\n",
}
_QUESTION = {"code": "\nPASS_KEY =", "prose": "\nWhat is the pass key? The pass key is"}
_INTRO = {"code": "", "prose": "A pass key is hidden in the text below. Find it and remember it.\n"}


@dataclass(frozen=True)
class Passkey(DepthProbe):
    """One number under a fixed name.

    digits: of the number.
    wording: "code" writes ``PASS_KEY = 48213``; "prose" asks in sentences, as the paper does. A small model of code
        goes on with a number after "=", and hardly after "is", whatever it remembers.
    """

    name: ClassVar[str] = "passkey"

    digits: int = 5
    wording: str = "code"

    def __post_init__(self) -> None:
        check_count("digits", self.digits, 1, MOST_DIGITS)
        check_choice("wording", self.wording, tuple(_FACT))

    def tell(self, depth: float, draw: np.random.Generator) -> Told:
        (key,) = draw_numbers(1, self.digits, draw)
        fact = _FACT[self.wording].format(key=key)
        return Told([(depth, fact)], _QUESTION[self.wording], f" {key}", _INTRO[self.wording])

    def chance(self, material: object) -> float:
        return 1 / (9 * 10 ** (self.digits - 1))
