"""Views: a call is one softmax over the pairs of its views, which have the value in common."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...plan.plan import Plan


class View(NamedTuple):
    """Pairs that are scored by this query and key.

    A call has one view, or a second one for far pairs, whose query and key stand at other places. The pairs of the
    views are disjoint.

    query: [B, H, Q, D]; key: [B, H_kv, K, D].
    plans: the pairs of each sequence; None for a sequence that has none.
    """

    query: Tensor
    key: Tensor
    plans: list[Plan | None]
