"""Queries and keys of far pairs: turned from where the model has put them to the places their pattern gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..patterns.places import Place, Places
from ..plan import Segment, Segments
from .rotary import Rotation


def new_tokens(segments: Segments, q_len: int) -> Tensor:
    """Return the positions [B, Q] int64 of the last `q_len` slots within their sequences; 0 for padding."""
    found = torch.zeros((segments.batch, q_len), dtype=torch.int64)
    for segment in segments.entries:
        at = segment.queries(q_len, segments.k_len)
        found[segment.rows, at] = _query_positions(segment, at)
    return found


def far_pair(
    rotation: Rotation,
    places: Places,
    query: Tensor,
    key: Tensor,
    segments: Segments,
    base: int,
    memo: dict[Any, Any],
    held: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the query [B, H, Q, D] and key [B, H_kv, K, D] that score pairs at a distance of `places.near` or more.

    Args:
        query, key: as the model has rotated them: tokens of the tail at their positions less `base`, earlier ones,
            which a cache holds at their own places, at their positions.
        memo: keeps angles for the other layers of the forward pass.
        held: the keys of far pairs, where a cache holds them.
    """
    q_len = query.shape[2]

    def queries() -> tuple[Tensor, Tensor]:
        tokens = new_tokens(segments, q_len)
        return tokens - base, places.query.at(tokens)

    def keys() -> tuple[Tensor, Tensor]:
        before, after = (torch.zeros((segments.batch, segments.k_len), dtype=torch.int64) for _ in range(2))
        for segment in segments.entries:
            tokens = torch.from_numpy(segment.positions)
            early = 0 if segment.columns is None else len(segment.columns)
            before[segment.rows, segment.slots] = torch.cat((tokens[:early], tokens[early:] - base))
            after[segment.rows, segment.slots] = places.key.at(tokens)
        return before, after

    def turned(x: Tensor, which: str, places_of: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        name = (which, segments, places, rotation, x.dtype, x.device)
        if name not in memo:
            rows = slice(0, 1 if segments.is_whole else None)
            before, after = (place[rows].to(x.device, non_blocking=True) for place in places_of())
            memo[name] = rotation.angles(after - before, x, before)
        return rotation.turn(x, memo[name])

    query_far = turned(query, "query", queries)
    if (
        places.key == Place()
    ):  # never turned: what a base moves is near, what is far was stored at its own place
        return query_far, key
    return query_far, turned(key, "key", keys) if held is None else held


def _query_positions(segment: Segment, at: slice | Tensor) -> Tensor:
    """Return the positions of a sequence's last tokens, those with these query indices."""
    count = at.stop - at.start if isinstance(at, slice) else len(at)
    return torch.arange(segment.end - count, segment.end)
