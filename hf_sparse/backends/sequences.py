"""A batch cut into what a backend computes at once: one sequence, and of it the heads that see the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..plan.plan import HeadPlan, Plan
from ..plan.segments import Segments

RunGroup = Callable[[Tensor, Tensor, Tensor, Plan, HeadPlan, int], Tensor]


def by_sequence(
    run: RunGroup, query: Tensor, key: Tensor, value: Tensor, segments: Segments, plans: list[Plan | None]
) -> Tensor:
    """Return the attention [B, H, Q, Dv] of a batch, differentiable where `run` is; padding gives 0.

    Args:
        run: called with query [b, h, q, D], key [b, h_kv, k, D], value [b, h_kv, k, Dv], the plan of the sequence, that
            of the heads, and the number of the sequence; h is a multiple of h_kv.
    """
    if segments.is_whole:
        assert plans[0] is not None
        return _by_heads(run, query, key, value, plans[0], 0)
    batch, heads, q_len, _ = query.shape
    out = query.new_zeros(batch, q_len, heads, value.shape[-1]).transpose(1, 2)
    # Part of the graph, also where every row is padding: the sums are over nothing.
    out = out + query[..., :0].sum() + key[..., :0].sum() + value[..., :0].sum()
    for number, (segment, plan) in enumerate(zip(segments.entries, plans, strict=True)):
        if plan is not None:
            rows, slots = segment.rows, segment.slots
            at = segment.queries(q_len, key.shape[2])
            part = _by_heads(
                run, query[rows, :, at], key[rows, :, slots], value[rows, :, slots], plan, number
            )
            out[rows, :, at] = part
    return out


def _by_heads(run: RunGroup, query: Tensor, key: Tensor, value: Tensor, plan: Plan, number: int) -> Tensor:
    if len(plan.groups) == 1:
        return run(query, key, value, plan, plan.groups[0], number)
    shared = query.shape[1] // key.shape[1]
    parts = []
    for group in plan.groups:
        read = [head // shared for head in group.heads]
        distinct = sorted(set(read))
        if read == [head for head in distinct for _ in range(len(read) // len(distinct))]:
            read = distinct  # the same number of query heads for each key head
        q, k, v = _heads(query, list(group.heads)), _heads(key, read), _heads(value, read)
        parts.append(run(q, k, v, plan, group, number))
    order = np.argsort([head for group in plan.groups for head in group.heads])
    return _heads(torch.cat(parts, 1), order.tolist())


def _heads(x: Tensor, heads: list[int]) -> Tensor:
    if heads == list(range(heads[0], heads[0] + len(heads))):
        return x[:, heads[0] : heads[-1] + 1]
    return x.index_select(1, torch.tensor(heads).to(x.device, non_blocking=True))
