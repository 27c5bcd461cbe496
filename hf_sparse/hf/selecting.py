"""What a layer under a content-based pattern reads in one call of the model."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from ..backends import Call
from ..backends.selected import select_all
from ..plan import Segments
from ..selectors import Selection, divided
from .mask import SparseMask


def selections_of(
    mask: SparseMask, call: Call, query: Tensor, key: Tensor, segments: Segments
) -> list[Selection | None] | None:
    """Return what each sequence of a call selects; None for a pattern that does not look at content.

    Layers that share a selection find that of the lowest of them in the memo of the forward pass.

    Args:
        query: [B, H, Q, D]; key: [B, H_kv, K, D], all keys of the sequences.
    Raises:
        ValueError: the cache holds tokens that no summaries were made of.
    """
    selector = divided(call.pattern, call.layer).selector
    if selector is None:
        return None
    known = ("selections", call.layer // selector.reuse)
    if selector.reuse > 1 and known in mask.memo:
        return cast(list[Selection | None], mask.memo[known])
    indexes = None if mask.indexes is None else mask.indexes(call.layer, selector, segments)
    found = select_all(selector, query, key, segments, call.constraint, indexes)
    if selector.reuse > 1:
        mask.memo[known] = found
    return found
