"""A schedule of patterns over the layers: narrow windows low and wide ones high, or one dense layer in every few.

Layered(pattern=SlidingWindow(2), dense_every=2):

    key  0 1 2 3 4     layer 0
    0    x . . . .
    1    x x . . .
    2    . x x . .
    3    . . x x .
    4    . . . x x

    key  0 1 2 3 4     layer 1
    0    x . . . .
    1    x x . . .
    2    x x x . .
    3    x x x x .
    4    x x x x x

Layered(layers={(0, 2): SlidingWindow(2), 2: SlidingWindow(3)}):

    key  0 1 2 3 4     layer 1
    0    x . . . .
    1    x x . . .
    2    . x x . .
    3    . . x x .
    4    . . . x x

    key  0 1 2 3 4     layer 2
    0    x . . . .
    1    x x . . .
    2    x x x . .
    3    . x x x .
    4    . . x x x
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from .algebra import Spelled, any_places, layer_of
from .base import Context, Pattern
from .checks import check_count
from .full import Full
from .places import Places
from .registry import register_pattern
from .sliding_window import SlidingWindow
from .written import as_pattern, pattern_to_json

_EVERY = 4
_MOST_LAYERS = 4096


@register_pattern("layered")
@dataclass(frozen=True)
class Layered(Spelled):
    """Each layer runs the pattern of its range, layers without one are dense; or `pattern`, every k-th layer dense.

    After construction `layers` is a tuple of (first, stop, pattern), ascending. A pattern may be given as an object, a
    name, or as `pattern_to_json` writes it. Neither layers nor pattern is ``pattern=SlidingWindow()``.
    """

    # {range(0, 6) or (first, stop) or layer: pattern}, the stop not included, or a list of (first, stop, pattern)
    layers: Any = None
    pattern: Any = None  # instead: what all layers run but the last of every `dense_every`, which is dense
    dense_every: int = _EVERY

    def __post_init__(self) -> None:
        check_count("dense_every", self.dense_every, 2)
        if self.layers is None:
            default = SlidingWindow() if self.pattern is None else self.pattern
            object.__setattr__(self, "pattern", as_pattern("pattern", default))
            return
        if self.pattern is not None or self.dense_every != _EVERY:
            raise ValueError(
                f"layers already says what every layer runs, got pattern={self.pattern} and "
                f"dense_every={self.dense_every} besides; leave them out"
            )
        object.__setattr__(self, "layers", _schedule(self.layers))

    @property
    def members(self) -> tuple[Pattern, ...]:
        if self.layers is None:
            return (self.pattern, Full())
        return tuple(dict.fromkeys((*(pattern for _, _, pattern in self.layers), Full())))

    @property
    def per_layer(self) -> bool:
        return True

    def check_fit(self, heads: int, layers: int) -> None:
        for first, stop, _ in self.layers or ():
            if stop > layers:
                raise ValueError(
                    f"layers {first} to {stop - 1} of the schedule do not fit a model whose last layer is "
                    f"{layers - 1}; end the range at {layers}"
                )
        super().check_fit(heads, layers)

    def spelled(self, context: Context) -> Pattern:
        layer = layer_of(context)
        if self.layers is None:
            return Full() if layer % self.dense_every == self.dense_every - 1 else self.pattern
        for first, stop, pattern in self.layers:
            if first <= layer < stop:
                return pattern
        return Full()

    def places(self, layer: int | None) -> Places | None:
        return any_places(self.members) if layer is None else self.spelled(Context(layer=layer)).places(layer)

    def resolve(self, seq_len: int) -> Layered:
        if self.layers is None:
            return replace(self, pattern=self.pattern.resolve(seq_len))
        return Layered(tuple((first, stop, p.resolve(seq_len)) for first, stop, p in self.layers))

    def options(self) -> dict[str, Any]:
        layers = self.layers and [[first, stop, pattern_to_json(p)] for first, stop, p in self.layers]
        pattern = self.pattern and pattern_to_json(self.pattern)
        return {"layers": layers, "pattern": pattern, "dense_every": self.dense_every}

    def __str__(self) -> str:
        if self.layers is None:
            return f"layered(pattern={self.pattern}, dense_every={self.dense_every})"
        runs = (
            f"{first}: {pattern}" if stop == first + 1 else f"{first}-{stop - 1}: {pattern}"
            for first, stop, pattern in self.layers
        )
        return f"layered({', '.join(runs)})"


def _schedule(layers: Any) -> tuple[tuple[int, int, Pattern], ...]:
    """Return (first, stop, pattern) in ascending order; raise ValueError where the ranges overlap or are none."""
    if isinstance(layers, Mapping):
        layers = [(key, value) for key, value in layers.items()]
    elif isinstance(layers, Sequence) and all(isinstance(e, (list, tuple)) and len(e) == 3 for e in layers):
        layers = [((first, stop), pattern) for first, stop, pattern in layers]
    else:
        raise ValueError(f"layers must be like {{(0, 6): pattern, 11: 'full'}}, got {layers!r}")
    found: list[tuple[int, int, Pattern]] = []
    for key, value in layers:
        pattern = as_pattern("layers", value)
        found += [(first, stop, pattern) for first, stop in _ranges(key)]
    if not found:
        raise ValueError(
            f"layers names no layer, got {layers!r}; name at least one, such as {{(0, 6): pattern}}"
        )
    found.sort(key=lambda entry: entry[:2])
    for before, after in pairwise(found):
        if after[0] < before[1]:
            raise ValueError(
                f"layers gives layer {after[0]} two patterns, {before[2]} and {after[2]}; make the ranges disjoint"
            )
    return tuple(found)


def _ranges(key: Any) -> list[tuple[int, int]]:
    """Return the layers of one key as (first, stop): an index, a pair, or a range of any step."""
    if isinstance(key, range) and key.step != 1:
        indices = list(key[: _MOST_LAYERS + 1])
    elif isinstance(key, range):
        key, indices = (key.start, key.stop), []
    else:
        indices = [key] if isinstance(key, int) and not isinstance(key, bool) else []
    pairs = [(index, index + 1) for index in indices] or [key]
    for pair in pairs:
        whole = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(i) is int for i in pair)
        if not whole or not 0 <= pair[0] < pair[1] <= _MOST_LAYERS:
            raise ValueError(
                f"layers must hold layer indices or (first, stop) with 0 <= first < stop <= {_MOST_LAYERS}, got {key!r}"
            )
    return [(first, stop) for first, stop in pairs]
