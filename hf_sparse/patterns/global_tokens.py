"""Global tokens (Longformer, Beltagy et al., 2020, arXiv:2004.05150; ETC, Ainslie et al., 2020, arXiv:2004.08483).

Chosen keys are seen by every query: at fixed positions, at every k-th position, wherever a word of `token_ids` occurs,
and where the `global_attention_mask` given to `forward` is 1.

GlobalTokens(positions=(0, 3)):

    key  0 1 2 3 4 5
    0    x . . . . .
    1    x x . . . .
    2    x . x . . .
    3    x . . x . .
    4    x . . x x .
    5    x . . x . x

    key  0 1 2 3 4 5     bidirectional
    0    x x x x x x
    1    x x . x . .
    2    x . x x . .
    3    x x x x x x
    4    x . . x x .
    5    x . . x . x

GlobalTokens(positions=(), ratio=0.5, global_queries=True):

    key  0 1 2 3 4 5
    0    x . . . . .
    1    x x . . . .
    2    x x x . . .
    3    x . x x . .
    4    x x x x x .
    5    x . x . x x
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Context, Pattern
from .checks import check_flag, check_positions, check_ratio, check_token_ids, period_of
from .parts import Every, Listed, Part, Periodic, periodic, window_part
from .registry import register_pattern


@register_pattern("global_tokens")
@dataclass(frozen=True)
class GlobalTokens(Pattern):
    """The token itself and the chosen keys; bidirectional: the chosen queries see everything."""

    positions: tuple[int, ...] = (0,)  # positions that every query sees
    token_ids: tuple[
        int, ...
    ] = ()  # vocabulary ids of special or anchor words, chosen wherever the input has them
    ratio: float | None = None  # also every round(1 / ratio)-th position, from the first one on
    global_queries: bool = (
        False  # causal: chosen queries see all their past, so that no key can ever be dropped
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", check_positions("positions", self.positions))
        object.__setattr__(self, "token_ids", check_token_ids("token_ids", self.token_ids))
        if self.ratio is not None:
            check_ratio("ratio", self.ratio)
        check_flag("global_queries", self.global_queries)

    @property
    def takes_globals(self) -> bool:
        return True

    @property
    def global_token_ids(self) -> tuple[int, ...]:
        return self.token_ids

    def allows(self, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = (query == key) | self._chosen(context, key)
        return allowed | self._chosen(context, query) if self._sees_all(context) else allowed

    def parts(self, context: Context) -> Sequence[Part]:
        chosen: list[Listed | Every | Periodic] = []
        if positions := self._positions(context):
            chosen.append(Listed(positions))
        if self.ratio is not None:
            chosen.append(periodic(period_of(self.ratio)))
        parts = [window_part(1), *(Part(keys) for keys in chosen)]
        if self._sees_all(context):
            # Where every position is chosen, every key already is.
            parts += [Part(Every(), queries=queries) for queries in chosen if not isinstance(queries, Every)]
        return parts

    def _sees_all(self, context: Context) -> bool:
        return self.global_queries or not context.causal

    def _positions(self, context: Context) -> tuple[int, ...]:
        return tuple(sorted({*self.positions, *context.chosen}))

    def _chosen(self, context: Context, position: Tensor) -> Tensor:
        listed = torch.tensor(self._positions(context), dtype=torch.long, device=position.device)
        chosen = torch.isin(position, listed)
        return chosen if self.ratio is None else chosen | (position % period_of(self.ratio) == 0)
