"""Copying: a block of random tokens returns after a distance, which shows exactly where a window forgets.

To go on with a copy, a model looks up what followed the same token before (induction heads, Olsson et al., 2022,
arXiv:2209.11895): the key it needs lies one token less than the distance back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import Probe, Sample, check_choice, check_count
from .material import Material

BETWEEN = ("haystack", "random")


@dataclass(frozen=True)
class Copy(Probe):
    """A block of distinct ordinary tokens that stands `distance` tokens before its copy, which ends the sample.

    The first token of the copy is the question, the others are the answer. A window of W tokens, the query included,
    sees what it has to copy up to a distance of W.

    block: tokens.
    between: what fills the rest: the "haystack", or "random" ordinary tokens that the block does not hold.
    """

    name: ClassVar[str] = "copy"
    axis: ClassVar[str] = "distance"
    figure: ClassVar[str] = "tokens_right"

    block: int = 32
    between: str = "haystack"

    def __post_init__(self) -> None:
        check_count("block", self.block, 2, 2**16)
        check_choice("between", self.between, BETWEEN)

    def make(self, material: Material, length: int, place: float, draw: np.random.Generator) -> Sample:
        block = draw.choice(material.ordinary, self.block, replace=False)
        room = length - len(material.prefix) - 2 * self.block
        before = room - (int(place) - self.block)
        if self.between == "haystack":
            filling = material.filling(room, int(draw.integers(len(material.haystack))))
        else:
            filling = draw.choice(np.setdiff1d(material.ordinary, block), room)
        parts = [material.prefix, filling[:before], block, filling[before:], block]
        return Sample(np.concatenate([np.asarray(part, dtype=np.int32) for part in parts]), self.block - 1)

    def check(self, material: Material, length: int, place: float, draw: np.random.Generator) -> None:
        needed, prefix = 2 * self.block + len(material.prefix), len(material.prefix)
        if length < needed:
            raise ValueError(
                f"length={length} is too short for {self}, whose block and its copy take {needed} tokens; "
                f"use {needed} or more, or a smaller block."
            )
        least = self.block if self.between == "haystack" else 2 * self.block
        if (found := len(material.ordinary)) < least:
            raise ValueError(
                f"the tokenizer has {found} ordinary tokens, and {self} needs {least}; use a smaller block."
            )
        if place % 1 or not self.block <= place <= length - self.block - prefix:
            raise ValueError(
                f"a distance of {place} does not fit {self} in length={length}; it must be a whole number from "
                f"{self.block} (the block) to {length - self.block - prefix}."
            )

    def chance(self, material: Material) -> float:
        """Any ordinary token."""
        return 1 / len(material.ordinary)
