"""Longformer (Beltagy et al., 2020, arXiv:2004.05150): a window, and global tokens at fixed positions.

Longformer(window=2, global_tokens=(0,)):

    key  0 1 2 3 4 5
    0    x . . . . .
    1    x x . . . .
    2    x x x . . .
    3    x . x x . .
    4    x . . x x .
    5    x . . . x x

Bidirectional, as in the paper, the global tokens also see everything:

    key  0 1 2 3 4 5
    0    x x x x x x
    1    x x x . . .
    2    x x x x . .
    3    x . x x x .
    4    x . . x x x
    5    x . . . x x
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Context, Pattern, check_count, check_positions
from .parts import Every, Listed, Part, window_part
from .registry import register_pattern


@register_pattern("longformer")
@dataclass(frozen=True)
class Longformer(Pattern):
    """``|q - k| < window``, the global keys for every query, and (bidirectional) every key for the global queries."""

    window: int = 512  # keys each query sees, itself included; bidirectional: window - 1 to each side
    global_tokens: tuple[int, ...] = (0,)  # positions that every query sees

    def __post_init__(self) -> None:
        check_count("window", self.window, 1)
        object.__setattr__(self, "global_tokens", check_positions("global_tokens", self.global_tokens))

    def allows(self, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        positions = torch.tensor(self.global_tokens, dtype=torch.long, device=key.device)
        allowed = ((query - key).abs() < self.window) | torch.isin(key, positions)
        return allowed if context.causal else allowed | torch.isin(query, positions)

    def parts(self, context: Context) -> Sequence[Part]:
        parts = [window_part(self.window)]
        if self.global_tokens:
            parts.append(Part(Listed(self.global_tokens)))
            if not context.causal:
                parts.append(Part(Every(), queries=self.global_tokens))
        return parts
