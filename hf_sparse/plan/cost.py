"""What a pattern costs, read off its plan: pairs, density, floating-point operations, bytes of keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..patterns.base import Pattern
from ..selectors import divided
from .constraint import Constraint
from .plan import Plan, make_plan
from .retention import key_groups, keys_held


@dataclass(frozen=True)
class Cost:
    """Cost of one attention layer on one sequence.

    pairs, dense_pairs: (query, key) pairs per head of the pattern, and of dense attention under the same constraint.
        What a selector reads by content is counted at its whole budget, also where a union holds some of it already.
    flops: floating-point operations of the two products of the forward pass, all heads (4 * head_dim per pair).
    kv_bytes_per_step: bytes of keys and values read to decode one token after n tokens; what several query heads of a
        key head read counts once. With a selector also the summaries of blocks, float32, which are read once for all
        queries that share a selection.
    kv_bytes_held: bytes of keys and values that a cache has to hold after n tokens, of each key head what any of its
        query heads may still see; all of them without causality.
    """

    pairs: float
    dense_pairs: int
    flops: float
    kv_bytes_per_step: float
    kv_bytes_held: float

    @property
    def density(self) -> float:
        """Pairs as a share of dense attention's."""
        return self.pairs / self.dense_pairs

    @property
    def limit(self) -> float:
        """The speed-up over dense attention if every pair costs the same."""
        return self.dense_pairs / self.pairs


def cost(
    pattern: Pattern,
    n: int,
    *,
    constraint: Constraint = Constraint(),
    heads: int = 1,
    kv_heads: int | None = None,
    head_dim: int = 64,
    dtype_bytes: int = 4,
    layer: int = 0,
) -> Cost:
    """Return the cost of `pattern` on a sequence of `n` tokens.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"the cost of a pattern needs a length of at least 1 token, got {n}")
    kv_heads = heads if kv_heads is None else kv_heads
    static, selector, _ = divided(pattern, layer)
    plan = make_plan(static, constraint, n, n, heads=heads, layer=layer)
    step = make_plan(static, constraint, 1, n, heads=heads, layer=layer)
    token_bytes = 2.0 * head_dim * dtype_bytes
    pairs, read, looked_at = plan.pairs, _keys_read(step, kv_heads), 0.0
    if selector is not None:
        starts = constraint.bounds()[0]
        pairs += selector.most_pairs(0, n, starts)
        read += selector.most_pairs(n - 1, n, starts) * (kv_heads if selector.by_key_head else heads)
        looked_at = n * selector.numbers_per_token(head_dim) * kv_heads
    return Cost(
        pairs=pairs,
        dense_pairs=plan.dense_pairs,
        flops=4.0 * head_dim * heads * pairs,
        kv_bytes_per_step=token_bytes * read + 4.0 * looked_at,
        kv_bytes_held=token_bytes * _keys_held(pattern, constraint, n, heads, kv_heads, layer),
    )


def _keys_held(
    pattern: Pattern, constraint: Constraint, n: int, heads: int, kv_heads: int, layer: int
) -> int:
    """Return the keys held, summed over key heads."""
    if not constraint.causal:
        return n * kv_heads
    groups = key_groups(pattern, constraint, heads, kv_heads, layer)
    return sum(len(group.kv_heads) * keys_held(group.retention, n) for group in groups)


def _keys_read(step: Plan, kv_heads: int) -> float:
    """Return the keys one query reads, summed over key heads: of each, those that any of its query heads wants.

    A predicate without parts does not say which keys its heads share; they then count as reading the mean.
    """
    if step.reads is None:
        return step.pairs * kv_heads
    sharing = step.heads // kv_heads
    keys = 0
    for kv in range(kv_heads):
        wanted = range(kv * sharing, (kv + 1) * sharing)
        readers = [(head, reads) for head in wanted for reads in step.reads if head in reads.heads]
        read = np.sort(np.concatenate([reads.keys_of(head) for head, reads in readers]), kind="stable")
        keys += len(read) and 1 + int((np.diff(read) != 0).sum())
    return float(keys)
