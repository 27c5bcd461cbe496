"""Attention calls that hold some of a layer's query heads: tensor parallelism, and sequence parallelism by heads.

DeepSpeed-Ulysses (arXiv:2309.14509) gives every process all tokens of some heads. A pattern that says the same of every
head needs to know nothing of that; one whose heads differ must be told which of them a process holds.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..patterns import Pattern
from ..patterns.base import Context
from ..patterns.parts import Drawn
from ..patterns.selected_heads import SelectedHeads
from .stored_settings import query_heads

_FIRST = "_hf_sparse_first_head"  # of the query heads that a process holds


def hold_heads(model: nn.Module, first: int) -> None:
    """Tell a model whose attention calls hold some of the query heads which one is their first.

    first: in processes that share the heads in order, the rank times the heads of each.

    Raises:
        ValueError: no head has this number.
    """
    config: Any = model.config
    heads = query_heads(config.get_text_config())
    if isinstance(first, bool) or not isinstance(first, int) or not 0 <= first < heads:
        raise ValueError(
            f"first must be the number of a query head, 0 to {heads - 1}, got {first!r}; give the rank times the heads "
            "of each process."
        )
    for module in model.modules():
        module.__dict__[_FIRST] = first


def refuse_spread_tokens(query: Tensor) -> None:
    """Raise ValueError where `query` is a part of a tensor that several processes share (a DTensor)."""
    if hasattr(query, "placements"):
        raise ValueError(
            "context parallelism gives each process a part of the tokens, and a pattern needs all of them; spread "
            "heads instead (Ulysses), or data (FSDP2, ZeRO)"
        )


def holds_some(module: nn.Module, query: Tensor) -> bool:
    """True where a call has fewer query heads [B, H, Q, D] than the model."""
    config = getattr(module, "config", None)
    return config is not None and query.shape[1] < query_heads(config)


def pattern_of_heads(pattern: Pattern, module: nn.Module, query: Tensor, layer: int, causal: bool) -> Pattern:
    """Return `pattern` as the query heads [B, H, Q, D] of this call see it.

    Raises:
        ValueError: it differs between heads, and nobody said which of them these are.
    """
    if not holds_some(module, query):
        return pattern
    heads, held = query_heads(module.config), query.shape[1]
    if _is_same(pattern, Context(causal, layer, heads, None if causal else query.shape[2], (0,))):
        return pattern
    first = module.__dict__.get(_FIRST)
    if first is None or first + held > heads:
        which = "nobody said which" if first is None else f"the first is said to be number {first}"
        raise ValueError(
            f"this call holds {held} of {heads} query heads, {which}, and {pattern} may differ between heads; call "
            "hf_sparse.hf.hold_heads(model, first) in every process"
        )
    return SelectedHeads(pattern, tuple(range(first, first + held)), heads)


def sinks_of_heads(sinks: Tensor, module: nn.Module, query: Tensor) -> Tensor:
    """Return those of a layer's sinks [H of the model] that belong to the query heads [B, H, Q, D] of this call.

    Raises:
        ValueError: nobody said which heads these are.
    """
    held, first = query.shape[1], module.__dict__.get(_FIRST)
    if len(sinks) == held:
        return sinks
    if first is None or first + held > len(sinks):
        raise ValueError(
            f"this call holds {held} of {len(sinks)} query heads, each with a sink, and nobody said which; call "
            "hf_sparse.hf.hold_heads(model, first) in every process"
        )
    return sinks[first : first + held]


def _is_same(pattern: Pattern, context: Context) -> bool:
    """True where a pattern provably says the same of every head."""
    parts = pattern.parts(context)
    return parts is not None and all(
        part.heads is None and not isinstance(part.keys, Drawn) for part in parts
    )
