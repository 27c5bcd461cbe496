"""Runs without a mask through the fused operator: all members of a family at once, as rows of the batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ...plan.pieces import Indices, Lattice
from .flash import flash_backward, flash_forward
from .lists import Tensors, take
from .merge import emit, merged, put
from .runs import Run, Span
from .schedule import Group

# A family is cut into this many calls, so that a call's output is no second copy of everything.
_CALLS = 8


def fits(run: Run, group: Group) -> bool:
    """True when the fused operator can compute a run: no mask, and one span, or one and the triangle after it."""
    spans = run.spans
    lists = (group.queries, *(group.keys[span.piece] for span in spans))
    if (
        not all(isinstance(indices, Lattice) for indices in lists)
        or run.repeat > 1
        or not spans
        or any(span.mask is not None for span in spans)
    ):
        return False
    return len(spans) == 1 or (len(spans) == 2 and spans[1].causal and not spans[0].causal)


def forward(run: Run, group: Group, tensors: Tensors, scale: float, merge: bool) -> None:
    """Compute a run of every member, or merge it with what is there."""
    for part in _parts(group, tensors):
        query, out, lse = (
            part.rows(x, group.queries, run) for x in (tensors.query, tensors.out, tensors.lse)
        )
        result: tuple[Tensor, Tensor] | None = None
        for span in run.spans:
            key, value = (part.keys(x, group.keys[span.piece], span) for x in (tensors.key, tensors.value))
            o, share = flash_forward(query, key, value, causal=span.causal, scale=scale)
            result = (o, share) if result is None else merged(*result, o, share)
        assert result is not None
        emit(out, lse, *result, merge)


def backward(run: Run, group: Group, tensors: Tensors, scale: float, writes: bool) -> None:
    """Write dq of a run of every member, or add it, and add dk and dv."""
    assert tensors.grad is not None and tensors.dquery is not None
    assert tensors.dkey is not None and tensors.dvalue is not None
    for part in _parts(group, tensors):
        query, out, lse, grad, dquery = (
            part.rows(x, group.queries, run)
            for x in (tensors.query, tensors.out, tensors.lse, tensors.grad, tensors.dquery)
        )
        dq = None
        for span in run.spans:
            indices = group.keys[span.piece]
            key, value, dkey, dvalue = (
                part.keys(x, indices, span)
                for x in (tensors.key, tensors.value, tensors.dkey, tensors.dvalue)
            )
            share, dk, dv = flash_backward(grad, query, key, value, out, lse, causal=span.causal, scale=scale)
            dkey += dk
            dvalue += dv
            dq = share if dq is None else dq + share
        assert dq is not None
        put(dquery, dq, writes)


@dataclass(frozen=True)
class _Part:
    """Some members of a family, of one row of the batch; or, where there is no family, the whole batch."""

    batch: int | None = None
    first: int = 0
    count: int = 1

    def rows(self, x: Tensor, queries: Indices, run: Run) -> Tensor:
        """View a run's rows of x [B, H, N, ...] as [members or B, H, rows, ...]."""
        assert isinstance(queries, Lattice)
        return self._view(x, Lattice(queries.first + run.row * queries.step, run.rows, queries.step))

    def keys(self, x: Tensor, indices: Indices, span: Span) -> Tensor:
        """View a span's keys of x [B, H_kv, N, D] as [members or B, H_kv, width, D]."""
        assert isinstance(indices, Lattice)
        return self._view(x, Lattice(indices.first + span.first * indices.step, span.width, indices.step))

    def _view(self, x: Tensor, indices: Lattice) -> Tensor:
        if self.batch is None:
            if x.dim() == 3:
                return take(x[..., None], indices)[..., 0]
            return take(x, indices)
        slab = x[self.batch]
        per_head, per_token, *rest = slab.stride()
        return slab.as_strided(
            (self.count, slab.shape[0], indices.count, *slab.shape[2:]),
            (per_token, per_head, per_token * indices.step, *rest),
            slab.storage_offset() + (indices.first + self.first) * per_token,
        )


def _parts(group: Group, tensors: Tensors) -> Iterator[_Part]:
    if group.repeat == 1:
        yield _Part()
        return
    step = -(-group.repeat // _CALLS)
    for batch in range(tensors.query.shape[0]):
        for first in range(0, group.repeat, step):
            yield _Part(batch, first, min(step, group.repeat - first))
