"""What the model itself imposes on a call, whatever the pattern: causality, its own window, its own chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..patterns.base import Context, Pattern
from ..patterns.parts import Bound


@dataclass(frozen=True)
class Constraint:
    """The host's own mask, ANDed with every pattern.

    causal: keys after the query are not allowed.
    window: the model's sliding window in keys, the query itself included (bidirectional: window - 1 to each side).
    chunk: the model's chunked attention: only keys of the query's own block of this many tokens.
    beyond: only keys at least this many tokens before the query; not the host's, but how one call is divided into pairs
        seen at their own distance and pairs seen at another (`hf_sparse.patterns.places`).
    """

    causal: bool = True
    window: int | None = None
    chunk: int | None = None
    beyond: int | None = None

    def context(
        self, pattern: Pattern, *, layer: int, heads: int, length: int, chosen: tuple[int, ...] = ()
    ) -> Context:
        """Return what `pattern` is told about a sequence of `length` tokens: nothing that it does not look at."""
        return Context(
            self.causal,
            layer if pattern.per_layer else None,
            heads,
            None if self.causal else length,
            chosen if pattern.takes_globals else (),
        )

    def allowed(self, pattern: Pattern, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return what the pattern and this constraint allow together; every token sees itself, but where it says not.

        Args:
            head, query, key: indices and positions, int64, broadcastable with one another.
        """
        own = pattern.allows(context, head, query, key)
        return (own | (query == key) if pattern.sees_itself else own) & self.admits(query, key)

    def admits(self, query: Tensor, key: Tensor) -> Tensor:
        """Return what this constraint alone allows, for positions that broadcast with each other."""
        allowed = key <= query if self.causal else torch.ones_like(key == query)
        if self.window is not None:
            allowed = allowed & ((query - key).abs() < self.window)
        if self.chunk is not None:
            allowed = allowed & (query // self.chunk == key // self.chunk)
        if self.beyond is not None:
            allowed = allowed & (query - key >= self.beyond)
        return allowed

    def bounds(self) -> tuple[tuple[Bound, ...], tuple[Bound, ...]]:
        """Return the same as bounds: keys lie at or after every start and before every stop."""
        starts, stops = [], []
        if self.causal:
            stops.append(Bound(1))
        if self.window is not None:
            starts.append(Bound(1 - self.window))
            stops.append(Bound(self.window))
        if self.chunk is not None:
            starts.append(Bound(mul=self.chunk, div=self.chunk))
            stops.append(Bound(self.chunk, mul=self.chunk, div=self.chunk))
        if self.beyond is not None:
            stops.append(Bound(1 - self.beyond))
        return tuple(starts), tuple(stops)
