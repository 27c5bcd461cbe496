"""The choice of backend, and the one function everything above calls: `attend`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..plan.constraint import Constraint
from ..plan.plan import HeadPlan, Plan, make_plan
from ..plan.segments import Segments
from ..selectors import AnySelection, Selection, divided
from . import cuda_flash, flex
from .call import Call, CallRecord, Inputs, is_recording, record
from .checks import check_tensors, one_dtype
from .dense import dense_attention, is_dense
from .foreseen import foreseen
from .pieces import View, operator, torch_attention
from .reference import reference_attention
from .selected import Selected, check_selector, count_selected, counts_pairs, select_all, selected_of
from .sequences import by_sequence
from .table import order

BACKENDS = ("auto", "reference", "torch", "flex", "cuda_flash")
_OPERATORS = {"flex": "flex_attention", "cuda_flash": "flash_attention"}


class Choice(NamedTuple):
    """What computes a call: a backend, and the operator within it."""

    backend: str
    operator: str


def check_backend(name: str) -> str:
    """Return the name of a backend; raise ValueError with the known ones otherwise."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}. Available: {', '.join(BACKENDS)}.")
    return name


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    segments: Segments | None = None,
    backend: str = "auto",
    far: tuple[Tensor, Tensor] | None = None,
    sinks: Tensor | None = None,
    selections: Sequence[AnySelection | None] | None = None,
) -> Tensor:
    """Return the attention of `query` over what the call's pattern and constraint allow.

    Args:
        query: [B, H, Q, D]; the queries are the last Q of the K slots.
        key: [B, H_kv, K, D]; H is a multiple of H_kv.
        value: [B, H_kv, K, Dv].
        segments: the sequences of the batch; None is one sequence per row.
        far: with `call.near`, the query [B, H, Q, D] and key [B, H_kv, K, D] that score pairs of tokens `near` or more
            apart; unread where the call has no such pair.
        sinks: [H], a logit per head that joins each softmax and has no value: weights sum to less than 1, by
            exp(sink) in the sum they are divided by (GPT-OSS, arXiv:2508.10925). None has none, as -inf.
        selections: of a content-based pattern, what each sequence reads; None selects here, for which every sequence
            must be in this call from its first token on.
    Returns:
        [B, H, Q, Dv] in the common dtype of the inputs (autocast's where it is on), laid out so that
        ``out.transpose(1, 2)`` is contiguous. Rows that may attend to nothing, padding included, are exactly 0.
    Raises:
        ValueError: shapes that do not fit, an unknown backend, one that cannot run this call, dropout outside [0, 1),
            `far` without `call.near` or the reverse, either without causality, `call.constraint.beyond`, or sinks
            that are not one per head.
    """
    check_backend(backend)
    segments = Segments.whole(query.shape[0], key.shape[2]) if segments is None else segments
    check_tensors(query, key, value, call, segments, far, sinks)
    query, key, value, *rest = one_dtype(query, key, value, *(far or ()))
    far = None if far is None else (rest[0], rest[1])
    if sinks is not None:  # never in half precision: a rounded logit is another share of every row
        sinks = sinks.to(query.device, torch.promote_types(query.dtype, torch.float32))
    heads, q_len = query.shape[1:3]
    division = divided(call.pattern, call.layer)
    selected: list[Selected | None] | None = None
    if division.selector is not None:
        check_selector(call, far, division.selector)
        if selections is None:
            selections = select_all(division.selector, query, key, segments, call.constraint)
        selected = selected_of(division, call, segments, selections, heads, q_len)
    call = replace(call, pattern=division.static)
    near_plans, far_plans = _divided(call, segments, heads, q_len)
    views = [View(query, key, near_plans)]
    seen = [plan if plan is not None and plan.pairs else None for plan in far_plans]
    if far is not None and any(seen):
        views.append(View(*far, seen))
    gradients = torch.is_grad_enabled() and any(
        x.requires_grad for x in (query, key, value, *rest, sinks) if x is not None
    )
    width = max(query.shape[-1], value.shape[-1])
    inputs = Inputs(query.device, query.dtype, width, gradients, sinks is not None, selected is not None)
    chosen = None if selected is None else [None if own is None else own.selection for own in selected]
    choice = choose(call, inputs, segments, near_plans, q_len, backend, chosen)
    if choice.backend == "reference":
        out = reference_attention(query, key, value, call, segments, far, sinks, selected)
    else:
        out = _compute(views, value, call, segments, choice, sinks, selected)
    if is_recording():
        made = _record(call, choice, segments, heads, near_plans, far_plans)
        count_selected(made, selected, heads)
        record(made)
    return out


def _record(
    call: Call,
    choice: Choice,
    segments: Segments,
    heads: int,
    near_plans: list[Plan | None],
    far_plans: list[Plan | None],
) -> CallRecord:
    made = CallRecord(call.layer, choice.backend, choice.operator)
    for segment, *plans in zip(segments.entries, near_plans, far_plans, strict=True):
        rows = segment.rows.stop - segment.rows.start
        for plan in plans:
            if plan is not None:
                made.pieces += plan.n_pieces
                made.pairs += round(plan.pairs * heads) * rows
                # Near and far pairs of dense attention are together all that it has.
                made.dense_pairs += plan.dense_pairs * heads * rows
    return made


def choose(
    call: Call,
    inputs: Inputs,
    segments: Segments,
    plans: list[Plan | None],
    q_len: int,
    backend: str = "auto",
    selections: Sequence[AnySelection | None] | None = None,
) -> Choice:
    """Return what computes a call of `q_len` queries.

    selections: where `inputs.selected`, what is read of each sequence.

    Raises:
        ValueError: `backend` is no backend, or cannot run this call; the message has every reason.
    """
    check_backend(backend)
    device = inputs.device.type
    if backend == "reference":
        return Choice("reference", "dense")
    # PyTorch's dense operators know no sinks.
    if (
        backend == "auto"
        and not (inputs.sinks or inputs.selected)
        and is_dense(call, segments, plans, q_len, device)
    ):
        return Choice("torch", "dense")
    if backend == "auto":
        queries = max((plan.q_len for plan in plans if plan is not None), default=0)
        wanted = order(device, str(inputs.dtype).removeprefix("torch."), queries)
        backend = next(name for name in wanted if not _reasons(name, call, inputs, plans, selections))
    elif reasons := _reasons(backend, call, inputs, plans, selections):
        raise ValueError(
            f"backend={backend!r} cannot run this call: {'; '.join(reasons)}; "
            f"use backend='auto' to let hf_sparse choose"
        )
    return Choice(
        backend,
        operator(call, inputs.device, plans if q_len == 1 and not counts_pairs(selections) else None)
        if backend == "torch"
        else _OPERATORS[backend],
    )


def preview(call: Call, inputs: Inputs, *, heads: int, length: int, backend: str = "auto") -> Choice:
    """Return what would compute the call for one sequence of `length` tokens without a cache.

    Raises:
        ValueError: as `choose`.
    """
    segments = Segments.whole(1, length)
    division = divided(call.pattern, call.layer)
    if division.selector is not None:
        check_selector(call, None, division.selector)
        inputs = replace(inputs, selected=True)
    plans, _ = _divided(replace(call, pattern=division.static), segments, heads, length)
    selections = foreseen(division.selector, heads, length)
    return choose(call, inputs, segments, plans, length, backend, selections)


def _reasons(
    backend: str,
    call: Call,
    inputs: Inputs,
    plans: list[Plan | None],
    selections: Sequence[AnySelection | None] | None,
) -> list[str]:
    """Return why a backend cannot run a call; nothing where it can."""
    if backend not in _OPERATORS:
        return []
    if call.near is not None:
        return ["far pairs need two queries and two keys per call"]
    if backend == "flex":
        return flex.unsupported(call, inputs, plans, selections)
    if inputs.selected:
        return ["it reads no selected blocks"]
    return cuda_flash.unsupported(call, inputs, plans)


def _compute(
    views: list[View],
    value: Tensor,
    call: Call,
    segments: Segments,
    choice: Choice,
    sinks: Tensor | None,
    selected: list[Selected | None] | None,
) -> Tensor:
    query, key, plans = views[0]
    if choice.operator == "dense":
        return dense_attention(query, key, value, call)
    if choice.backend == "torch":
        return torch_attention(views, value, call, segments, sinks, selected)

    def run_group(q: Tensor, k: Tensor, v: Tensor, plan: Plan, group: HeadPlan, number: int) -> Tensor:
        if choice.backend == "flex":
            own = None if sinks is None else sinks[list(group.heads)]
            chosen = None if selected is None else selected[number]
            selection = None if chosen is None else chosen.selection
            assert selection is None or isinstance(selection, Selection), "of others flex has reasons"
            return flex.flex_attention(q, k, v, call, plan, group, own, selection)
        return cuda_flash.flash_attention(q, k, v, call, plan, group)

    out = by_sequence(run_group, query, key, value, segments, plans)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _divided(
    call: Call, segments: Segments, heads: int, q_len: int
) -> tuple[list[Plan | None], list[Plan | None]]:
    """Return each sequence's plan of near pairs, which are all where the call has no `near`, and of far ones."""
    constraint, near = call.constraint, call.near
    if near is None or any(
        reach is not None and reach <= near for reach in (constraint.window, constraint.chunk)
    ):
        return _sequence_plans(call, constraint, segments, heads, q_len), [None] * len(segments.entries)
    return (
        _sequence_plans(call, replace(constraint, window=near), segments, heads, q_len),
        _sequence_plans(call, replace(constraint, beyond=near), segments, heads, q_len),
    )


def _sequence_plans(
    call: Call, constraint: Constraint, segments: Segments, heads: int, q_len: int
) -> list[Plan | None]:
    """Return the plan of each sequence, made once for all layers; None for one without queries in this call."""
    layer = call.layer if call.pattern.per_layer else 0
    known = ("plans", call.pattern, constraint, heads, q_len, layer)
    if known in segments.memo:
        return cast(list[Plan | None], segments.memo[known])
    plans: list[Plan | None] = []
    for segment in segments.entries:
        length = segment.queries_in(q_len, segments.k_len)
        plan = None
        if length > 0:
            plan = make_plan(
                call.pattern,
                constraint,
                length,
                segment.length,
                heads=heads,
                layer=layer,
                first=segment.first,
                chosen=segment.chosen,
                columns=segment.columns,
            )
        plans.append(plan)
    segments.memo[known] = plans
    return plans
