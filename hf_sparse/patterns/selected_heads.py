"""A pattern as one of its layers, or some of its heads, see it: what is asked of those alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .algebra import PerHead, PerLayer
from .base import Context, Pattern
from .layered import Layered
from .parts import Draw, Drawn, Part


@dataclass(frozen=True)
class SelectedHeads(Pattern):
    """Query head i runs what head ``heads[i]`` of a model with `of` query heads runs; made for a call, never saved."""

    pattern: Pattern
    heads: tuple[int, ...]  # ascending
    of: int

    @property
    def members(self) -> tuple[Pattern, ...]:
        return (self.pattern,)

    def allows(self, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return self.pattern.allows(self._whole(context), _among(self.heads, head), query, key)

    def parts(self, context: Context) -> Sequence[Part] | None:
        parts = self.pattern.parts(self._whole(context))
        if parts is None:
            return None
        own: list[Part] = []
        for part in parts:
            heads = self.heads if part.heads is None else part.heads
            places = tuple(i for i, head in enumerate(self.heads) if head in heads)
            if not places:
                continue
            keys = part.keys
            if isinstance(keys, Drawn):
                keys = replace(keys, draw=SelectedDraw(keys.draw, self.heads))
            whole = len(places) == len(self.heads)
            own.append(replace(part, keys=keys, heads=None if whole else places))
        return list(dict.fromkeys(own))

    def __str__(self) -> str:
        return f"{self.pattern} in heads {', '.join(map(str, self.heads))}"

    def _whole(self, context: Context) -> Context:
        return replace(context, heads=self.of)


@dataclass(frozen=True)
class SelectedDraw:
    """Draws for head i what `draw` draws for head ``heads[i]``."""

    draw: Draw
    heads: tuple[int, ...]

    def __call__(self, head: Tensor, block: Tensor) -> Tensor:
        return self.draw(_among(self.heads, head), block)


def of_layer(pattern: Pattern, layer: int) -> Pattern:
    """Return what `pattern` is in one layer, where it does nothing but give each layer its own."""
    if isinstance(pattern, PerLayer):
        return of_layer(pattern.patterns[layer], layer)
    if isinstance(pattern, Layered):
        return of_layer(pattern.spelled(Context(layer=layer)), layer)
    return pattern


def of_heads(pattern: Pattern, heads: tuple[int, ...], of: int) -> Pattern:
    """Return `pattern` as these query heads of `of`, ascending, see it in causal models.

    A pattern that provably says the same of all of them stays itself, so that layers share its plans.
    """
    if isinstance(pattern, PerHead) and len(own := {pattern.patterns[head] for head in heads}) == 1:
        (pattern,) = own
    if len(heads) == of:
        return pattern
    selected = SelectedHeads(pattern, heads, of)
    if pattern.takes_globals or pattern.per_layer:  # their parts depend on more than the heads
        return selected
    alone = Context(heads=len(heads))
    parts = pattern.parts(alone)
    return pattern if parts is not None and list(parts) == selected.parts(alone) else selected


def _among(heads: tuple[int, ...], head: Tensor) -> Tensor:
    return torch.tensor(heads, device=head.device)[head]
