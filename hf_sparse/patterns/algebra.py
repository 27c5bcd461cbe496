"""Patterns made of patterns: the union ``SlidingWindow(512) | Strided(64)``, one per head, one per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .base import Context, Pattern
from .checks import check_list_fits
from .parts import Part
from .places import Places
from .registry import get_pattern

_RUNS = 12  # different patterns of heads or layers that are written out


@dataclass(frozen=True)
class Union(Pattern):
    """A key is allowed where any member allows it; written ``a | b``, flat and without repetition."""

    members: tuple[Pattern, ...] = ()  # at least one; see Union.of

    def __post_init__(self) -> None:
        check_distances("a union", self.members)

    @staticmethod
    def of(*patterns: Pattern) -> Union:
        flat: list[Pattern] = []
        for pattern in check_patterns("a union", patterns):
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
        return list(dict.fromkeys(parts))

    def resolve(self, seq_len: int) -> Union:
        return Union.of(*(member.resolve(seq_len) for member in self.members))

    def __str__(self) -> str:
        return " | ".join(str(member) for member in self.members)


@dataclass(frozen=True)
class PerHead(Pattern):
    """Query head h runs ``patterns[h]``; the heads of one key-value group may differ."""

    patterns: tuple[Pattern, ...]  # one for each query head of the model

    def __post_init__(self) -> None:
        object.__setattr__(self, "patterns", check_patterns("PerHead", self.patterns))
        check_distances("PerHead", self.patterns)

    @property
    def members(self) -> tuple[Pattern, ...]:
        return tuple(dict.fromkeys(self.patterns))

    def check_fit(self, heads: int, layers: int) -> None:
        check_list_fits("PerHead", self.patterns, "query head", heads)
        super().check_fit(heads, layers)

    def allows(self, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = torch.zeros_like((head == query) | (query == key))
        for pattern, heads in self._shares(context):
            mine = torch.isin(head, torch.tensor(heads, device=head.device))
            allowed = allowed | (mine & pattern.allows(context, head, query, key))
        return allowed

    def parts(self, context: Context) -> Sequence[Part] | None:
        parts: list[Part] = []
        for pattern, heads in self._shares(context):
            own = pattern.parts(context)
            if own is None:
                return None
            for part in own:
                both = heads if part.heads is None else tuple(h for h in part.heads if h in heads)
                if both:
                    parts.append(replace(part, heads=None if len(both) == context.heads else both))
        return parts

    def resolve(self, seq_len: int) -> PerHead:
        return PerHead(tuple(pattern.resolve(seq_len) for pattern in self.patterns))

    def __str__(self) -> str:
        return f"per_head({_runs(self.patterns)})"

    def _shares(self, context: Context) -> list[tuple[Pattern, tuple[int, ...]]]:
        """Return each distinct pattern with the heads of the call that run it."""
        if context.heads > len(self.patterns):
            check_list_fits("PerHead", self.patterns, "query head", context.heads)
        shares: dict[Pattern, list[int]] = {}
        for head, pattern in enumerate(self.patterns[: context.heads]):
            shares.setdefault(pattern, []).append(head)
        return [(pattern, tuple(heads)) for pattern, heads in shares.items()]


@dataclass(frozen=True)
class PerLayer(Pattern):
    """Layer number i runs ``patterns[i]``."""

    patterns: tuple[Pattern, ...]  # one for each layer of the model, the bottom one first

    def __post_init__(self) -> None:
        object.__setattr__(self, "patterns", check_patterns("PerLayer", self.patterns))

    @property
    def members(self) -> tuple[Pattern, ...]:
        return tuple(dict.fromkeys(self.patterns))

    @property
    def per_layer(self) -> bool:
        return True

    def check_fit(self, heads: int, layers: int) -> None:
        check_list_fits("PerLayer", self.patterns, "layer", layers)
        super().check_fit(heads, layers)

    def allows(self, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return self._at(context).allows(context, head, query, key)

    def parts(self, context: Context) -> Sequence[Part] | None:
        return self._at(context).parts(context)

    def places(self, layer: int | None) -> Places | None:
        return any_places(self.members) if layer is None else self._at(Context(layer=layer)).places(layer)

    def resolve(self, seq_len: int) -> PerLayer:
        return PerLayer(tuple(pattern.resolve(seq_len) for pattern in self.patterns))

    def __str__(self) -> str:
        return f"per_layer({_runs(self.patterns)})"

    def _at(self, context: Context) -> Pattern:
        layer = layer_of(context)
        if layer >= len(self.patterns):
            check_list_fits("PerLayer", self.patterns, "layer", layer + 1)
        return self.patterns[layer]


class Spelled(Pattern):
    """A named system that is nothing but other patterns put together."""

    def spelled(self, context: Context) -> Pattern:
        """Return the patterns it stands for in this call."""
        raise NotImplementedError(f"{type(self).__name__} must define spelled(context)")

    def allows(self, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return self.spelled(context).allows(context, head, query, key)

    def parts(self, context: Context) -> Sequence[Part] | None:
        return self.spelled(context).parts(context)


def halves(heads: int, first: Pattern, second: Pattern) -> PerHead:
    """Return `first` for the first half of the heads (rounded down) and `second` for the rest."""
    return PerHead((first,) * (heads // 2) + (second,) * (heads - heads // 2))


def check_halves(pattern: Pattern, heads: int) -> None:
    """Raise ValueError where a pattern that splits the heads in two halves gets a single one."""
    if heads < 2:
        raise ValueError(
            f"{pattern} splits the query heads in two halves and needs at least 2, the model has {heads}; "
            f"choose a pattern that does not"
        )


def layer_of(context: Context) -> int:
    """Return the layer of a call for a pattern that declares `per_layer`."""
    assert context.layer is not None, "a pattern that declares per_layer is always asked for a layer"
    return context.layer


def any_places(patterns: Sequence[Pattern]) -> Places | None:
    """Return the places of the first of the patterns that has some in any layer; None where none has."""
    return next((places for pattern in patterns if (places := pattern.places(None)) is not None), None)


def check_distances(owner: str, patterns: Sequence[Pattern]) -> None:
    """Raise ValueError where one of several patterns of the same layer says at which distance far keys are seen."""
    for pattern in patterns:
        if pattern.places(None) is not None:
            raise ValueError(
                f"{owner} cannot hold {pattern}, which sets the distances of far keys, as a pair would then have two; "
                f"leave its positions 'absolute', or wrap the whole, as in ReRoPE(pattern=a | b)"
            )


def check_patterns(owner: str, patterns: Any) -> tuple[Pattern, ...]:
    """Return `patterns` as a tuple; raise ValueError where it is empty or holds anything else."""
    if not isinstance(patterns, Sequence) or isinstance(patterns, (str, bytes)):
        raise ValueError(
            f"{owner} takes a list of patterns, got {patterns!r}; write [get_pattern(name), ...]"
        )
    if not patterns:
        raise ValueError(f"{owner} joins at least one pattern, got none; name one")
    for pattern in patterns:
        if not isinstance(pattern, Pattern):
            raise ValueError(
                f"{owner} joins patterns, got {type(pattern).__name__}; use get_pattern(name) first"
            )
        get_pattern(pattern)  # refuses one that cannot be hashed
    return tuple(patterns)


def _runs(patterns: Sequence[Pattern]) -> str:
    """Write equal neighbours once: ``0-3: sliding_window(window=64), 4: full()``."""
    written, first = [], 0
    for text, group in groupby(map(str, patterns)):
        last = first + len(list(group)) - 1
        written.append(f"{first}: {text}" if first == last else f"{first}-{last}: {text}")
        first = last + 1
    if len(written) > _RUNS:  # as long lists are cut in the options of a pattern
        written = [*written[: _RUNS // 2], f"... {written[-1]}"]
    return ", ".join(written)
