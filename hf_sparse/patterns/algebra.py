"""Patterns made of patterns: the union ``SlidingWindow(512) | Strided(64)``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .base import Context, Pattern
from .parts import Part


@dataclass(frozen=True)
class Union(Pattern):
    """A key is allowed where any member allows it; written ``a | b``, flat and without repetition."""

    members: tuple[Pattern, ...]

    @staticmethod
    def of(*patterns: Pattern) -> Union:
        flat: list[Pattern] = []
        for pattern in patterns:
            if not isinstance(pattern, Pattern):
                raise ValueError(
                    f"a union joins patterns, got {type(pattern).__name__}; use get_pattern(name) first"
                )
            flat += pattern.members if isinstance(pattern, Union) else [pattern]
        return Union(tuple(dict.fromkeys(flat)))

    def allows(self, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = self.members[0].allows(context, head, query, key)
        for member in self.members[1:]:
            allowed = allowed | member.allows(context, head, query, key)
        return allowed

    def parts(self, context: Context) -> Sequence[Part] | None:
        parts: list[Part] = []
        for member in self.members:
            own = member.parts(context)
            if own is None:
                return None
            parts += own
        return parts

    @property
    def per_layer(self) -> bool:  # type: ignore[override]
        return any(member.per_layer for member in self.members)

    def resolve(self, seq_len: int) -> Union:
        return Union.of(*(member.resolve(seq_len) for member in self.members))

    def __str__(self) -> str:
        return " | ".join(str(member) for member in self.members)
