"""Budgets of content-based layers that are set while a model runs: they lie over its pattern, which stays as it is.

Caches are made for a pattern, and are good for any budget of it: a layer that selects drops no keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeGuard

from torch import nn

from ..patterns import Pattern, PerLayer, Union
from ..patterns.layered import Layered
from ..selectors import Selector, divided
from ..selectors.block_selector import BlockSelector

Keep = int | float  # what one layer's `keep` may be: a number of blocks, or a share of them
_BUDGETS = "_hf_sparse_budgets"  # what a module's layers keep in place of what their pattern says


def selector_of(pattern: Pattern, layer: int) -> Selector | None:
    """Return what selects in a layer; None where positions alone decide."""
    return divided(pattern, layer).selector


def has_budget(pattern: Pattern | None) -> TypeGuard[BlockSelector]:
    """True for what selects by content where `keep` says how many blocks are read."""
    return isinstance(pattern, BlockSelector)


@contextmanager
def budgets_over(model: nn.Module, budgets: Mapping[int, Keep]) -> Iterator[None]:
    """Let layers of `model` keep `budgets` inside the block, by layer; they may be changed between forward passes."""
    modules = list(model.modules())
    for module in modules:
        module.__dict__[_BUDGETS] = budgets
    try:
        yield
    finally:
        for module in modules:
            module.__dict__.pop(_BUDGETS)


def under_budget(module: nn.Module, layer: int, selector: Selector, memo: dict[Any, Any]) -> Selector:
    """Return the selector with the budget that lies over it, if any.

    memo: of the forward pass, which keeps its budgets when gradient checkpointing runs a layer again.
    """
    budgets: Mapping[int, Keep] = module.__dict__.get(_BUDGETS, {})
    if layer not in budgets or not has_budget(selector):
        return selector
    keep = memo.setdefault(("budget", layer), budgets[layer])
    return selector if keep == selector.keep else replace(selector, keep=keep)


def with_budgets(pattern: Pattern, budgets: Mapping[int, Keep], layers: int) -> Pattern:
    """Return the pattern whose selectors keep `budgets` in those layers, and elsewhere what they do.

    layers: of the model.
    """
    if has_budget(pattern):
        now = pattern.keep if isinstance(pattern.keep, tuple) else (pattern.keep,) * layers
        return replace(pattern, keep=tuple(budgets.get(layer, keep) for layer, keep in enumerate(now)))
    if not pattern.content_based or isinstance(pattern, Selector):
        return pattern
    if isinstance(pattern, Union):
        return Union.of(*(with_budgets(member, budgets, layers) for member in pattern.members))
    if isinstance(pattern, PerLayer):
        own = (_in_layer(one, budgets, layer, layers) for layer, one in enumerate(pattern.patterns))
        return PerLayer(tuple(own))
    if isinstance(pattern, Layered) and pattern.layers is not None:
        runs = ((a, b, with_budgets(one, budgets, layers)) for a, b, one in pattern.layers)
        return replace(pattern, layers=tuple(runs))
    if isinstance(pattern, Layered):
        return replace(pattern, pattern=with_budgets(pattern.pattern, budgets, layers))
    raise ValueError(f"{pattern} has no place for budgets; give layers their own with PerLayer or Layered")


def _in_layer(pattern: Pattern, budgets: Mapping[int, Keep], layer: int, layers: int) -> Pattern:
    """Return what one layer runs, its budget a number rather than a list of those of all layers."""
    if has_budget(pattern) and layer in budgets:
        return replace(pattern, keep=budgets[layer])
    if isinstance(pattern, Union):
        return Union.of(*(_in_layer(member, budgets, layer, layers) for member in pattern.members))
    return with_budgets(pattern, budgets, layers)
