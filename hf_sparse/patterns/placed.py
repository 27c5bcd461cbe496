"""What the patterns share that see far keys at other distances and leave to another pattern which keys these are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .algebra import Spelled
from .base import Context, Pattern
from .places import Places
from .written import as_pattern, pattern_to_json


class Placed(Spelled):
    """A pattern that allows what its option `pattern` allows; a subclass, a frozen dataclass, says `places`."""

    pattern: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", as_pattern("pattern", self.pattern))
        if self.pattern.places(None) is not None:
            raise ValueError(
                f"pattern must leave the distances of far keys to {self.name}, got {self.pattern}, which has its own; "
                f"choose one that only says which keys are seen"
            )

    @property
    def members(self) -> tuple[Pattern, ...]:
        return (self.pattern,)

    def spelled(self, context: Context) -> Pattern:
        return self.pattern

    def places(self, layer: int | None) -> Places | None:
        raise NotImplementedError(f"{type(self).__name__} must define places(layer)")

    def resolve(self, seq_len: int) -> Pattern:
        # A field of the subclasses only, so not one that mypy sees here.
        resolved: dict[str, Any] = {"pattern": self.pattern.resolve(seq_len)}
        return replace(self, **resolved)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "pattern": pattern_to_json(self.pattern)}
