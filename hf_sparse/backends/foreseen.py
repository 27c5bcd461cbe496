"""What a content-based pattern will select, as far as it is known before there are queries and keys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..selectors import Selection, Selector
from ..selectors.blocks import ListSelector


def foreseen(selector: Selector | None, heads: int, length: int) -> Sequence[Selection | None] | None:
    """Return the blocks that one sequence is cut into, nothing of them selected; None where there will be no lists.

    A list is foreseen for each query head, the most there can be.
    """
    if not isinstance(selector, ListSelector):
        return None
    blocks = -(-length // selector.queries)
    lists = torch.empty((1, heads, blocks, 0), dtype=torch.int64, device="meta")
    return [Selection(selector.block, selector.queries, 0, lists, np.zeros(blocks, dtype=np.int64))]
