"""Which layers a cache consists of and what each of them keeps, for making one and for telling its bytes beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
)

from ..patterns import Pattern, get_pattern
from ..patterns.places import Place
from ..patterns.selected_heads import of_heads, of_layer
from ..plan import Constraint
from ..plan.retention import KeyGroup, Retention, key_groups
from ..selectors import divided
from .account import Account
from .cache_layer import LinearAndSparseLayer, SparseLayer
from .global_projections import projecting
from .native import key_heads, layer_constraint
from .ragged_layer import HeadPart, RaggedLayer
from .rotary import Rotation
from .stored_settings import SparseSettings, key_sources, layer_count, query_heads

_REPLACED = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionAndFullAttentionLayer)
# Between cache and attention these change keys, as those do that hold latents (MLA): their heads stay together.
_CHANGE_KEYS = {"idefics", "jetmoe", "moonshine", "moonshine_streaming"}


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What becomes of one layer.

    stock: the layer that transformers would take.
    pattern: what the layer runs.
    kept: what decides of the keys to keep: every key where several layers with different patterns read them.
    limit: the model's own constraint on the layer.
    kv_heads: its key heads.
    groups: key heads that keep the same; empty where the stock layer stays, which keeps everything.
    borrows: the keys are those of another layer.
    """

    stock: Any
    pattern: Pattern
    kept: Pattern
    limit: Constraint
    kv_heads: int
    groups: tuple[KeyGroup, ...]
    borrows: bool


def plan_layers(settings: SparseSettings, config: Any) -> list[LayerPlan]:
    """Return what becomes of each layer of a model with this text config that runs `settings`."""
    heads, sources, modes = (
        query_heads(config),
        key_sources(config),
        getattr(config, "kv_sharing_modes", None),
    )
    stocks = _stock_layers(config)
    patterns = [of_layer(settings.pattern_at(index), index) for index in range(len(stocks))]
    plans = []
    for index, (stock, pattern) in enumerate(zip(stocks, patterns, strict=True)):
        readers = [patterns[reader] for reader, source in enumerate(sources) if source == index]
        differ = len(readers) > 1 and (pattern.per_layer or len(set(readers)) > 1)
        kept = get_pattern("full") if differ else pattern
        limit = layer_constraint(config, index, causal=True) if _is_sliding(stock) else Constraint()
        limit = _with_selected(limit, kept, index)
        kv_heads, layer = key_heads(config, index), index if kept.per_layer else 0
        # Global queries with projections of their own look at every token.
        if type(stock) not in _REPLACED or projecting(pattern, index, heads) is not None:
            groups: tuple[KeyGroup, ...] = ()
        elif (
            type(stock) is LinearAttentionAndFullAttentionLayer
            or (modes is not None and modes[index] == "store")  # other layers, or another model, read them
            or kept.places(index) is not None
            or not _hands_keys_on(config)
            or not kv_heads
            or heads % kv_heads
        ):
            groups = (KeyGroup(tuple(range(kv_heads)), None, Retention(kept, limit, heads, layer)),)
        else:
            groups = key_groups(kept, limit, heads, kv_heads, layer)
        plans.append(LayerPlan(stock, pattern, kept, limit, kv_heads, groups, sources[index] != index))
    return plans


def make_layers(
    settings: SparseSettings, config: Any, rotations: Mapping[int, Rotation | None]
) -> tuple[list[Any], int | None]:
    """Return the empty layers of a cache, and the farthest place of a query where all bound rotary positions.

    rotations: of the layers whose keys or queries are turned to places of their own.
    """
    accounts: dict[Any, Account] = {}
    layers: list[Any] = []
    most: list[int | None] = []
    for index, plan in enumerate(plan_layers(settings, config)):
        if isinstance(plan.stock, DynamicLayer) or plan.borrows:
            placed = rotations and (plan.groups or plan.borrows)
            most.append(_farthest(plan.pattern, index) if placed else None)
        layers.append(_layer(plan, index, query_heads(config), accounts, rotations.get(index)))
    bounded = [m for m in most if m is not None]
    return layers, max(bounded) if bounded and len(bounded) == len(most) else None


def _layer(
    plan: LayerPlan, index: int, heads: int, accounts: dict[Any, Account], rotation: Rotation | None
) -> Any:
    """Return the layer of a cache; `accounts` are those of the layers before."""
    stock, own = plan.stock, []
    for group in plan.groups:
        key = group.retention.key
        if (
            plan.kept.takes_globals or plan.kept.places(index) is not None
        ):  # what is kept is more than parts say
            key = plan.kept, plan.limit, index if plan.kept.per_layer else None, group.only
        account = Account(plan.kept, plan.limit, heads, index, group.only)
        own.append(accounts.setdefault(key, account))
    if not own:
        return stock
    if isinstance(stock, LinearAttentionAndFullAttentionLayer):
        return LinearAndSparseLayer(own[0], rotation, stock.number_of_states)
    if len(own) == 1:
        return SparseLayer(own[0], rotation, stock.is_sliding)
    parts = []
    for group, account in zip(plan.groups, own, strict=True):
        assert group.only is not None
        pattern = of_heads(plan.pattern, group.only, heads)
        parts.append(HeadPart(group.kv_heads, pattern, SparseLayer(account)))
    return RaggedLayer(parts, stock.is_sliding)


def _with_selected(limit: Constraint, pattern: Pattern, layer: int) -> Constraint:
    """Return a window that also holds a block until it is summarised, and until its readers have gone."""
    selector = divided(pattern, layer).selector
    if selector is None or limit.window is None:
        return limit
    return replace(limit, window=limit.window + selector.block + selector.queries)


def _farthest(pattern: Pattern, layer: int) -> int | None:
    """Return the farthest place of a query where sinks stay at their own; None where places are not of that kind."""
    places = pattern.places(layer)
    return None if places is None or places.key != Place() else places.query.most


def _is_sliding(stock: Any) -> bool:
    return bool(getattr(stock, "is_sliding", False))


def _hands_keys_on(config: Any) -> bool:
    """True where attention gets the very keys that the cache returns."""
    return getattr(config, "kv_lora_rank", None) is None and config.model_type not in _CHANGE_KEYS


def _stock_layers(config: Any) -> list[Any]:
    """Return the layers that transformers would take, as many as there are."""
    stock: list[Any] = list(DynamicCache(config=config).layers)
    # Of BART's numbers of layers transformers takes the encoder's.
    return [*stock, *(DynamicLayer() for _ in range(layer_count(config) - len(stock)))][: layer_count(config)]
