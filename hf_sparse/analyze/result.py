"""What an analysis found: how much of the attention each pattern keeps, and which one each head wants."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..patterns import Pattern, Union
from ..patterns.base import short
from ..patterns.written import pattern_to_json
from .candidates import SLACK

FORMAT = 1
NEAR = 0.01  # of the mass: what keeps less than so much less than the best is nearly as good


@dataclass(frozen=True, eq=False)
class Analysis:
    """The result of `analyze`.

    patterns: what was analysed, P of them, and densities: the share of dense attention's pairs that each reads.
    mass: float64 [P, L, H], the share of the dense attention weight that a pattern keeps, the mean over windows and
        queries.
    layers: indices of the L layers, those that have attention.
    density: the one asked for.
    notes: what was left out or changed, a sentence each.
    """

    patterns: tuple[Pattern, ...]
    densities: tuple[float, ...]
    mass: np.ndarray
    layers: tuple[int, ...]
    density: float
    notes: tuple[str, ...]
    config: dict[str, Any]
    machine: dict[str, Any]

    @property
    def labels(self) -> list[str]:
        """What each pattern is called: its name and the options that are not as usual."""
        return [label(pattern) for pattern in self.patterns]

    @property
    def names(self) -> list[str]:
        """What each is called where there is little room: its name, or its label where another has the name too."""
        own = [pattern.name for pattern in self.patterns]
        return [
            name if name and own.count(name) == 1 else longer
            for name, longer in zip(own, self.labels, strict=True)
        ]

    @property
    def comparable(self) -> np.ndarray:
        """bool [P]: False for a pattern that keeps more only because it reads more than was asked for."""
        return np.array(self.densities) <= SLACK * self.density

    @cached_property
    def wanted(self) -> np.ndarray:
        """int [L, H]: the number of the pattern that keeps most of a head's mass, of comparable ones; the first of
        several that keep as much."""
        return self._short_of_best.argmin(0)

    @property
    def wanted_by(self) -> list[int]:
        """How many heads want each pattern."""
        return [int((self.wanted == number).sum()) for number in range(len(self.patterns))]

    @property
    def nearly_by(self) -> list[int]:
        """In how many heads each pattern keeps all but NEAR of what the best one keeps, that one included."""
        return [int((missing < NEAR).sum()) for missing in self._short_of_best]

    @cached_property
    def _short_of_best(self) -> np.ndarray:
        """float64 [P, L, H]: how much less each pattern keeps than the best; endless for what is not comparable."""
        held = np.where(self.comparable[:, None, None], self.mass, -np.inf)
        return held.max(0) - held

    def table(self) -> str:
        """Return what was found as lines of text, at most 120 characters wide."""
        from .table import table

        return table(self)

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> list[Path]:
        """Write analysis.json (every figure), mass.csv and heatmap.png into `folder`; return the paths.

        Raises:
            ValueError: a folder that holds another analysis or cannot be written, or matplotlib is missing.
        """
        from .save import save

        return save(self, folder, overwrite)

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        columns = zip(
            *(self.names, self.labels, self.patterns, self.densities, self.comparable.tolist()),
            *(self.mass, self.wanted_by, self.nearly_by),
            strict=True,
        )
        return {
            "format": FORMAT,
            "density": self.density,
            "layers": list(self.layers),
            "patterns": [
                {
                    "name": name,
                    "label": longer,
                    "pattern": pattern_to_json(pattern),
                    "density": density,
                    "comparable": comparable,
                    "mean_mass": float(mass.mean()),
                    "wanted_by": wanted_by,
                    "nearly_by": nearly_by,
                    "mass": mass.tolist(),
                }
                for name, longer, pattern, density, comparable, mass, wanted_by, nearly_by in columns
            ],
            "wanted": self.wanted.tolist(),
            "notes": list(self.notes),
            "config": self.config,
            "machine": self.machine,
        }


def label(pattern: Pattern) -> str:
    """Return the name of a pattern with those of its options that differ from their defaults."""
    if isinstance(pattern, Union):
        return " | ".join(label(member) for member in pattern.members)
    if not pattern.name:
        return str(pattern)
    values = [(field.name, getattr(pattern, field.name), field.default) for field in fields(pattern)]
    options = [f"{name}={short(value)}" for name, value, default in values if value != default]
    return f"{pattern.name}({', '.join(options)})" if options else pattern.name
