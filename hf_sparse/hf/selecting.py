"""What a layer under a content-based pattern reads in one call of the model."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ..backends import Call
from ..backends.selected import select_all
from ..plan import Segments
from ..selectors import AnySelection, refuse_looking_ahead
from .budgets import selector_of, under_budget
from .mask import SparseMask


def selections_of(
    module: nn.Module,
    mask: SparseMask,
    call: Call,
    query: Tensor,
    key: Tensor,
    segments: Segments,
    trial: bool,
) -> list[AnySelection | None] | None:
    """Return what each sequence of a call selects; None for a pattern that does not look at content.

    Layers that share a selection, which have the same selector, find that of the lowest of them in the memo of the
    forward pass.

    Args:
        query: [B, H, Q, D]; key: [B, H_kv, K, D], all keys of the sequences.
        trial: nothing of this pass is kept.
    Raises:
        ValueError: the cache holds tokens that no summaries were made of; the pattern looks ahead and this is not the
            prompt of a generation.
    """
    selector = selector_of(call.pattern, call.layer)
    if selector is None:
        return None
    known = ("selections", selector, call.layer // selector.reuse)
    if selector.reuse > 1 and known in mask.memo:
        return cast(list[AnySelection | None], mask.memo[known])
    trained = module.training or (torch.is_grad_enabled() and query.requires_grad)
    if not trial and (mask.indexes is None or trained):
        without = "not for a text without a cache (hf_sparse.make_cache)"
        refuse_looking_ahead(selector, "not for training (use torch.no_grad)" if trained else without)
    selector = under_budget(module, call.layer, selector, mask.memo)
    indexes = None if mask.indexes is None else mask.indexes(call.layer, selector, segments)
    for index in indexes or ():
        index.selector = selector  # whose budget may have been another before
    found = select_all(selector, query, key, segments, call.constraint, indexes)
    if selector.reuse > 1:
        mask.memo[known] = found
    return found
