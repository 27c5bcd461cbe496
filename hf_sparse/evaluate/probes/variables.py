"""Variable tracking (RULER, Hsieh et al., 2024, arXiv:2404.06654): a value that goes from variable to variable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import DepthProbe, Told, check_choice, check_count
from .drawing import draw_letters, draw_numbers

ASKS = ("variables", "value")


@dataclass(frozen=True)
class Variables(DepthProbe):
    """Chains ``A = 12345``, ``B = A``, ``C = B``, ...; the first link of the chain asked for lies at the depth.

    Its other links follow in order anywhere between there and the question, other chains lie anywhere.

    hops: links after the first; chains: how many there are.
    ask: "variables" asks for all that hold a value, in order, as RULER does; "value" for what the last one holds.
    """

    name: ClassVar[str] = "variables"

    hops: int = 4
    chains: int = 2
    ask: str = "variables"

    def __post_init__(self) -> None:
        check_count("hops", self.hops, 1, 100)
        check_count("chains", self.chains, 1, 100)
        check_choice("ask", self.ask, ASKS)

    def tell(self, depth: float, draw: np.random.Generator) -> Told:
        names = np.array(draw_letters(self.chains * (self.hops + 1), draw)).reshape(self.chains, -1).tolist()
        values = draw_numbers(self.chains, 5, draw)
        facts: list[tuple[float, str]] = []
        for chain, (variables, value) in enumerate(zip(names, values, strict=True)):
            first, *later = draw.random(self.hops + 1).tolist()
            first = depth if chain == 0 else first
            depths = [first, *(first + (1 - first) * share for share in sorted(later))]
            facts += [
                (place, f"\n{variable} = {source}\n")
                for place, variable, source in zip(depths, variables, [value, *variables], strict=False)
            ]
        if self.ask == "value":
            return Told(facts, f"\nassert {names[0][-1]} ==", f" {values[0]}")
        return Told(facts, f"\nvariables that are {values[0]}:", f" {', '.join(names[0])}")

    def chance(self, material: object) -> float | None:
        """One of the values in the haystack, whichever; of several variables it is not known."""
        return 1 / self.chains if self.ask == "value" else None
