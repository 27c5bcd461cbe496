"""A sliding window with gaps (Longformer, Beltagy et al., 2020, arXiv:2004.05150): every dilation-th of more keys.

DilatedWindow(window=3, dilation=2):

    key  0 1 2 3 4 5 6
    0    x . . . . . .
    1    . x . . . . .
    2    x . x . . . .
    3    . x . x . . .
    4    x . x . x . .
    5    . x . x . x .
    6    . . x . x . x

DilatedWindow(window=2, dilation=(1, 3)):

    key  0 1 2 3 4     head 0 of 2
    0    x . . . .
    1    x x . . .
    2    . x x . .
    3    . . x x .
    4    . . . x x

    key  0 1 2 3 4     head 1 of 2
    0    x . . . .
    1    . x . . .
    2    . . x . .
    3    x . . x .
    4    . x . . x
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import Context, Pattern
from .checks import check_count, check_counts, check_list_fits, check_product
from .parts import Every, Part, Residue, window_part
from .registry import register_pattern


@register_pattern("dilated_window")
@dataclass(frozen=True)
class DilatedWindow(Pattern):
    """Every dilation-th of the nearest keys: ``|q - k| < window * dilation`` and ``(q - k) % dilation == 0``."""

    window: int = 256  # keys each query sees, itself included; bidirectional: window - 1 to each side
    dilation: int | tuple[int, ...] = (
        2  # tokens from one of them to the next: one number, or one per query head
    )

    def __post_init__(self) -> None:
        check_count("window", self.window, 1)
        object.__setattr__(self, "dilation", check_counts("dilation", self.dilation, "query head"))
        check_product("window * dilation", self.window, max(self._per_head(1)))

    def check_fit(self, heads: int, layers: int) -> None:
        if isinstance(self.dilation, tuple):
            check_list_fits("dilation", self.dilation, "query head", heads)

    def allows(self, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        dilation: int | Tensor
        if isinstance(self.dilation, int):
            dilation = self.dilation
        else:
            dilation = torch.tensor(self._per_head(context.heads), device=head.device)[head]
        return ((query - key).abs() < self.window * dilation) & ((query - key) % dilation == 0)

    def parts(self, context: Context) -> Sequence[Part]:
        if isinstance(self.dilation, int):
            return [self._part(self.dilation)]
        per_head = self._per_head(context.heads)[: context.heads]
        heads = {d: tuple(h for h, own in enumerate(per_head) if own == d) for d in per_head}
        if len(heads) == 1:
            return [self._part(per_head[0])]
        return [replace(self._part(dilation), heads=own) for dilation, own in heads.items()]

    def _part(self, dilation: int) -> Part:
        return window_part(self.window * dilation, Every() if dilation == 1 else Residue(dilation))

    def _per_head(self, heads: int) -> tuple[int, ...]:
        """Return one dilation for each of the `heads` query heads of a call."""
        if isinstance(self.dilation, int):
            return (self.dilation,) * heads
        if heads > len(self.dilation):
            check_list_fits("dilation", self.dilation, "query head", heads)
        return self.dilation
