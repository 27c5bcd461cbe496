"""What the cells of a picture belong to: the members of a union, or the parts another pattern says it consists of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..patterns import Context, Pattern, Union
from ..patterns.parts import Bound, Drawn, Listed, Part, Periodic, Residue
from ..patterns.probe import parts_mask


@dataclass(frozen=True, eq=False)
class Area:
    """Cells with one name: bool [H, N, N], and may reach past what is allowed."""

    name: str
    cells: Tensor


def areas(pattern: Pattern, length: int, *, heads: int, causal: bool, layer: int) -> list[Area]:
    """Return the named areas that show in a pattern's mask at `length` tokens; none where it is all of one kind."""
    named: dict[str, Tensor] = {}
    if isinstance(pattern, Union):
        for member in pattern.members:
            named[str(member)] = member.mask(length, heads=heads, causal=causal, layer=layer)
    else:
        context = Context(causal, layer if pattern.per_layer else None, heads, None if causal else length)
        by_name: dict[str, list[Part]] = {}
        for part in pattern.parts(context) or ():
            by_name.setdefault(_name(part), []).append(part)
        named = {name: parts_mask(parts, heads, length) for name, parts in by_name.items()}
    left = pattern.mask(length, heads=heads, causal=causal, layer=layer)
    shown = []
    for name, cells in named.items():
        if (cells & left).any():  # not where an earlier one already lies
            shown.append(Area(name, cells))
            left = left & ~cells
    return shown if len(shown) > 1 else []


def _name(part: Part) -> str:
    keys = part.keys
    if part.queries is not None:
        return "queries that see everything"
    if isinstance(keys, Drawn):
        return "drawn at random"
    if isinstance(keys, Listed):
        return "chosen positions"
    if isinstance(keys, Periodic):
        width = "one" if keys.width == 1 else str(keys.width)
        return f"{width} of every {keys.period} positions"
    if isinstance(keys, Residue):
        return f"one of every {keys.stride} keys back"
    if (part.start, part.stop) == (Bound(0), Bound(1)):
        return "the token itself"
    if part.start is None and part.stop is not None and part.stop.mul == 0:
        return "the first positions"
    return "every key" if part.start is part.stop is None else "nearby keys"
