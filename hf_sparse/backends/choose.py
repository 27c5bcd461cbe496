"""The choice of backend, and the one function everything above calls: `attend`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..plan.plan import HeadPlan, Plan, make_plan
from ..plan.segments import Segments
from . import cuda_flash, flex
from .call import Call, CallRecord, Inputs, record
from .pieces import operator, torch_attention
from .reference import reference_attention
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
) -> Tensor:
    """Return the attention of `query` over what the call's pattern and constraint allow.

    Args:
        query: [B, H, Q, D]; the queries are the last Q of the K slots.
        key: [B, H_kv, K, D]; H is a multiple of H_kv.
        value: [B, H_kv, K, Dv].
        segments: the sequences of the batch; None is one sequence per row.
    Returns:
        [B, H, Q, Dv] in the common dtype of the inputs (autocast's where it is on), laid out so that
        ``out.transpose(1, 2)`` is contiguous. Rows that may attend to nothing, padding included, are exactly 0.
    Raises:
        ValueError: shapes that do not fit, an unknown backend, one that cannot run this call, or dropout outside
            [0, 1).
    """
    check_backend(backend)
    segments = Segments.whole(query.shape[0], key.shape[2]) if segments is None else segments
    _check(query, key, value, call, segments)
    query, key, value = _one_dtype(query, key, value)
    heads, q_len = query.shape[1:3]
    plans = _sequence_plans(call, segments, heads, q_len)
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    width = max(query.shape[-1], value.shape[-1])
    inputs = Inputs(query.device, query.dtype, width, gradients)
    choice = choose(call, inputs, segments, plans, q_len, backend)
    out = _compute(query, key, value, call, segments, plans, choice)
    made = CallRecord(call.layer, choice.backend, choice.operator)
    for segment, plan in zip(segments.entries, plans, strict=True):
        if plan is not None:
            rows = segment.rows.stop - segment.rows.start
            made.pieces += plan.n_pieces
            made.pairs += round(plan.pairs * heads) * rows
            made.dense_pairs += plan.dense_pairs * heads * rows
    record(made)
    return out


def choose(
    call: Call,
    inputs: Inputs,
    segments: Segments,
    plans: list[Plan | None],
    q_len: int,
    backend: str = "auto",
) -> Choice:
    """Return what computes a call of `q_len` queries.

    Raises:
        ValueError: `backend` is no backend, or cannot run this call; the message has every reason.
    """
    check_backend(backend)
    device = inputs.device.type
    if backend == "reference":
        return Choice("reference", "dense")
    if backend == "auto" and _is_dense(call, segments, plans, q_len, device):
        return Choice("torch", "dense")
    if backend == "auto":
        queries = max((plan.q_len for plan in plans if plan is not None), default=0)
        wanted = order(device, str(inputs.dtype).removeprefix("torch."), queries)
        backend = next(name for name in wanted if not _reasons(name, call, inputs, plans))
    elif reasons := _reasons(backend, call, inputs, plans):
        raise ValueError(
            f"backend={backend!r} cannot run this call: {'; '.join(reasons)}; "
            f"use backend='auto' to let hf_sparse choose"
        )
    return Choice(
        backend, operator(call, inputs.device, plans) if backend == "torch" else _OPERATORS[backend]
    )


def preview(call: Call, inputs: Inputs, *, heads: int, length: int, backend: str = "auto") -> Choice:
    """Return what would compute the call for one sequence of `length` tokens without a cache.

    Raises:
        ValueError: as `choose`.
    """
    segments = Segments.whole(1, length)
    return choose(call, inputs, segments, _sequence_plans(call, segments, heads, length), length, backend)


def _reasons(backend: str, call: Call, inputs: Inputs, plans: list[Plan | None]) -> list[str]:
    """Return why a backend cannot run a call; nothing where it can."""
    if backend == "flex":
        return flex.unsupported(call, inputs, plans)
    if backend == "cuda_flash":
        return cuda_flash.unsupported(call, inputs, plans)
    return []


def _compute(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    segments: Segments,
    plans: list[Plan | None],
    choice: Choice,
) -> Tensor:
    if choice.backend == "reference":
        return reference_attention(query, key, value, call, segments)
    if choice.operator == "dense":
        return _dense(query, key, value, call)
    if choice.backend == "torch":
        return torch_attention(query, key, value, call, segments, plans)
    run = flex.flex_attention if choice.backend == "flex" else cuda_flash.flash_attention

    def run_group(q: Tensor, k: Tensor, v: Tensor, plan: Plan, group: HeadPlan) -> Tensor:
        return run(q, k, v, call, plan, group)

    out = by_sequence(run_group, query, key, value, segments, plans)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _sequence_plans(call: Call, segments: Segments, heads: int, q_len: int) -> list[Plan | None]:
    """Return the plan of each sequence; None for one without queries in this call."""
    plans: list[Plan | None] = []
    for segment in segments.entries:
        queries = segment.queries(q_len, segments.k_len)
        length = queries.stop - queries.start if isinstance(queries, slice) else len(queries)
        plan = None
        if length > 0:
            plan = make_plan(
                call.pattern,
                call.constraint,
                length,
                segment.length,
                heads=heads,
                layer=call.layer,
                first=segment.first,
                chosen=segment.chosen,
            )
        plans.append(plan)
    return plans


def _is_dense(call: Call, segments: Segments, plans: list[Plan | None], q_len: int, device: str) -> bool:
    """True when the plan holds every pair of plain attention, and PyTorch has an operator for it."""
    plan = plans[0] if segments.is_whole else None
    if plan is None or call.softcap is not None or (call.dropout and device == "cpu"):
        return False
    k_len = segments.k_len
    if not call.constraint.causal or q_len == 1:
        return plan.pairs == q_len * k_len
    return q_len == k_len and plan.pairs == q_len * (q_len + 1) // 2


def _dense(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    """The same attention by PyTorch's own dense operator, where nothing is sparse about the call."""
    return scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=call.dropout,
        is_causal=call.constraint.causal and query.shape[2] > 1,
        scale=call.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _check(query: Tensor, key: Tensor, value: Tensor, call: Call, segments: Segments) -> None:
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise ValueError("attention takes query [B, H, Q, D], key [B, H_kv, K, D] and value [B, H_kv, K, Dv]")
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"shapes do not fit: query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    if not query.dtype.is_floating_point or not (
        key.dtype.is_floating_point and value.dtype.is_floating_point
    ):
        raise ValueError(
            f"attention takes floating-point tensors, got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    if 0 in (query.shape[1], key.shape[1], query.shape[3]):
        raise ValueError(
            f"attention needs at least one head of at least one channel, got query {tuple(query.shape)} and key "
            f"{tuple(key.shape)}"
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads are no multiple of {key.shape[1]} key heads")
    if query.shape[2] > key.shape[2]:
        raise ValueError(
            f"{query.shape[2]} queries for {key.shape[2]} keys: queries are the last of the keys"
        )
    if (segments.batch, segments.k_len) != (key.shape[0], key.shape[2]):
        raise ValueError(
            f"segments describe {segments.batch} x {segments.k_len} slots, the keys are {key.shape[0]} x {key.shape[2]}"
        )
    if not 0.0 <= call.dropout < 1.0:
        raise ValueError(f"dropout must be at least 0 and below 1, got {call.dropout}")
    if call.softcap is not None and not call.softcap > 0:
        raise ValueError(f"softcap must be above 0, or None for no cap, got {call.softcap}")


def _one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return all three in one dtype: autocast's where it is on (rotary embeddings leave q and k in float32 there)."""
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    return query.to(dtype), key.to(dtype), value.to(dtype)
