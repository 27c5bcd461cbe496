"""A pattern divided into what positions alone decide and what is selected by content."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ..patterns.algebra import Union
from ..patterns.base import Pattern
from ..patterns.full import Full
from ..patterns.selected_heads import of_layer
from .base import Selector


class Division(NamedTuple):
    """What one layer reads: the pairs of a static pattern, and the blocks that a selector chooses besides.

    others: what a query reads by position and the selector may select too, which then does not count twice: of a
        selector that never selects what it keeps, what is beside that. None where there is nothing.
    """

    static: Pattern
    selector: Selector | None = None
    others: Pattern | None = None


@lru_cache(maxsize=256)
def divided(pattern: Pattern, layer: int) -> Division:
    """Return how `pattern` divides in a layer.

    Raises:
        ValueError: content decides within a pattern that cannot leave room for it.
    """
    if not pattern.content_based:
        return Division(pattern)
    pattern = of_layer(pattern, layer)
    members = pattern.members if isinstance(pattern, Union) else (pattern,)
    own = [member.at_layer(layer) if isinstance(member, Selector) else member for member in members]
    selectors = [member for member in own if isinstance(member, Selector)]
    others = [member for member in own if not isinstance(member, Selector)]
    if any(isinstance(member, Full) for member in others):
        return Division(Full())
    for member in others:
        if member.content_based:
            raise ValueError(
                f"{member} cannot hold a content-based pattern; put it beside others in a union, or give it to layers "
                f"with PerLayer or Layered"
            )
    if not selectors:
        return Division(pattern)
    if len(selectors) > 1:
        raise ValueError(
            f"a layer can have one content-based pattern, got {' and '.join(map(str, selectors))}; leave one out"
        )
    (selector,) = selectors
    static = Union.of(selector.kept, *others) if others else selector.kept
    if not selector.keeps_apart:
        return Division(static, selector, static)
    rest = others[0] if len(others) == 1 else Union.of(*others) if others else None
    return Division(static, selector, rest)


def refuse_looking_ahead(pattern: Pattern, what: str) -> None:
    """Raise ValueError where later tokens would decide what earlier ones read, which `what` must not have."""
    for member in pattern.members:
        refuse_looking_ahead(member, what)
    if isinstance(pattern, Selector) and pattern.looks_ahead:
        raise ValueError(
            f"selection='prompt' lets later tokens of a text decide what earlier ones read, so {pattern} is for the "
            f"prompt of a generation and {what}; use selection='causal'"
        )
