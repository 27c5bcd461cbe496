"""One walk through a schedule, forward or backward: pieces computed one after the other and merged.

Long stretches without a mask (dense prefixes, residues of a stride) go through the fused flash operator; everything
else through cache-sized tiles. Given the merged output and the merged log-sum-exp each piece's backward pass is exact,
so training keeps q, k, v, the output and one number per row, and never a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...plan.pieces import IndexList, Lattice
from ...plan.plan import Plan
from ..call import Call
from .flash import flash_backward, flash_forward
from .fold import add, fold, is_view, write
from .merge import emit, merged, put
from .schedule import Group, Run, Schedule, make_schedule
from .strips import Strip, in_strips, run_strips
from .tiled import Tiled
from .tiles import plan_tiles, run_tiles

# Query rows of a chunk, over all query heads of a key head. On a CPU fewer rows leave fewer masked pairs at the ends of
# a window, but below 64 the matrix products slow down.
_CPU_ROWS = 64
_OTHER_ROWS = 256


def operator(call: Call, device: torch.device) -> str:
    """Return "flash+tiled" where the fused operator serves spans without a mask, "tiled" where tiles serve all."""
    fused = device.type == "cpu" and not call.dropout and call.softcap is None
    return "flash+tiled" if fused else "tiled"


@dataclass
class Pass:
    """One walk through a schedule, for one sequence.

    query [B, H, Q, D], key [B, H_kv, K, D], value [B, H_kv, K, Dv]; out [B, H, Q, Dv] and lse [B, H, Q] are written by
    `forward` and read by `backward`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor
    schedule: Schedule
    tiled: Tiled
    want_lse: bool

    def forward(self) -> None:
        """Write `out` and `lse`; rows that no key serves get 0 and -inf."""
        merge = not self.schedule.single
        if merge or not self.schedule.covers:
            self.out.zero_()
            self.lse.fill_(float("-inf"))
        for group in _groups(self.schedule):
            lists = _Lists(self, group, empty=not merge)
            for run in group.runs:
                lists.forward(run, merge)
            if not lists.in_place:
                write(self.out, group.queries, group.repeat, lists.out)
                write(self.lse[..., None], group.queries, group.repeat, lists.lse[..., None])
        for tile in plan_tiles(self.schedule.tiles, self.query, self.key, self.value):
            o, part = self.tiled.forward(self.query[tile.place], tile.spans, tile.empty, merge)
            emit(self.out[tile.place], self.lse[tile.place], o, part, merge)

    def backward(self, grad: Tensor, dquery: Tensor, dkey: Tensor, dvalue: Tensor) -> None:
        """Write dq, and add to dk and dv, [B, H or H_kv, N, D]; `grad` [B, H, Q, Dv] is the output's gradient."""
        alone = self.schedule.single
        if not (alone and self.schedule.covers):
            dquery.zero_()
        for group in _groups(self.schedule):
            lists = _Lists(self, group)
            gradients = _Gradients(lists, grad, dquery, dkey, dvalue)
            for run in group.runs:
                gradients.backward(run, alone)
            gradients.finish(dkey, dvalue)
        for tile in plan_tiles(self.schedule.tiles, self.query, self.key, self.value, dkey, dvalue):
            at = tile.place
            lse = None if alone else self.lse[at]
            dq = self.tiled.backward(grad[at], self.query[at], tile.spans, self.out[at], lse, tile.empty)
            put(dquery[at], dq, alone)


class _Lists:
    """The tensors of one group, its queries and keys in the order of their lists.

    query, out: [B, members * H, count, D or Dv]; lse: [B, members * H, count]; keys, values: one per piece.
    in_place: `out` and `lse` are views of the pass's own.
    """

    def __init__(self, step: Pass, group: Group, empty: bool = False) -> None:
        self.step, self.group = step, group
        self.in_place = is_view(group.queries, group.repeat)
        self.query = fold(step.query, group.queries, group.repeat)
        self.keys = [fold(step.key, keys, group.repeat) for keys in group.keys]
        self.values = [fold(step.value, keys, group.repeat) for keys in group.keys]
        if empty and not self.in_place:
            self.out = step.out.new_empty((*self.query.shape[:3], step.value.shape[-1]))
            self.lse = step.lse.new_empty(self.query.shape[:3])
        else:
            self.out = fold(step.out, group.queries, group.repeat)
            self.lse = fold(step.lse[..., None], group.queries, group.repeat)[..., 0]

    def forward(self, run: Run, merge: bool) -> None:
        if not run.spans and not merge:
            self.out[:, :, run.all_rows] = 0.0
            self.lse[:, :, run.all_rows] = float("-inf")
        if self.is_fused(run):
            for number, rows in run.chunks():
                o, part = self._flash(run, number, rows)
                emit(self.out[:, :, rows], self.lse[:, :, rows], o, part, merge)
            return
        want = merge or (self.step.want_lse and len(run.spans) > 1)
        # The backward pass goes tile by tile, and must draw the dropout masks in the same order.
        if in_strips(run) and not self.step.tiled.dropout:
            for strip in run_strips(run, self.query, self.keys, self.values):
                self._strip(strip, want, merge)
            return
        for tile in run_tiles(run, self.query, self.keys, self.values):
            o, share = self.step.tiled.forward(self.query[tile.place], tile.spans, tile.empty, want)
            emit(self.out[tile.place], self.lse[tile.place], o, share, merge)

    def _strip(self, strip: Strip, want: bool, merge: bool) -> None:
        rows = strip.take(self.query)
        exact = torch.promote_types(rows.dtype, torch.float32)
        o, share = self.step.tiled.forward_rows(rows.to(exact), strip.spans, None, want)
        lse = self.lse[..., None]
        if merge:
            assert share is not None
            o, share = merged(strip.take(self.out), strip.take(lse)[..., 0], o, share)
        strip.put(self.out, o)
        if share is not None:
            strip.put(lse, share[..., None])

    def is_fused(self, run: Run) -> bool:
        """True when the fused operator computes this run: no mask, and one span, or one and the triangle after it."""
        tiled = self.step.tiled
        if tiled.dropout or tiled.softcap is not None or self.query.device.type != "cpu" or not run.spans:
            return False
        return all(span.mask is None for span in run.spans) and (len(run.spans) == 1 or run.spans[-1].causal)

    def _flash(self, run: Run, number: int, rows: slice) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] | None = None
        for span in run.spans:
            part = span.keys(number)
            key, value = self.keys[span.piece][:, :, part], self.values[span.piece][:, :, part]
            scale = self.step.tiled.scale
            o, lse = flash_forward(self.query[:, :, rows], key, value, causal=span.causal, scale=scale)
            result = (o, lse) if result is None else merged(*result, o, lse)
        assert result is not None
        return result


class _Gradients:
    """The gradients of one group; views of the pass's own where the lists are slices, added to them at the end else."""

    def __init__(self, lists: _Lists, grad: Tensor, dquery: Tensor, dkey: Tensor, dvalue: Tensor) -> None:
        group = lists.group
        self.lists, self.dquery = lists, dquery
        self.grad = fold(grad, group.queries, group.repeat)
        self.dkeys, self.dvalues = [], []
        for keys, key, value in zip(group.keys, lists.keys, lists.values, strict=True):
            if is_view(keys, group.repeat):
                self.dkeys.append(fold(dkey, keys))
                self.dvalues.append(fold(dvalue, keys))
            else:
                self.dkeys.append(torch.zeros_like(key, dtype=dkey.dtype))
                self.dvalues.append(torch.zeros_like(value, dtype=dvalue.dtype))

    def backward(self, run: Run, alone: bool) -> None:
        lists, group = self.lists, self.lists.group
        # Where the queries are no slice, the run's dq is made apart: row 0 of `dq` is then the run's first.
        shift = 0 if lists.in_place else run.row
        if lists.in_place:
            dq = fold(self.dquery, group.queries)
        else:
            size = (*lists.query.shape[:2], run.rows * run.repeat, lists.query.shape[-1])
            dq = lists.query.new_zeros(size, dtype=self.dquery.dtype)
        if not run.spans and alone and lists.in_place:
            dq[:, :, run.all_rows] = 0.0
        if lists.is_fused(run):
            for number, rows in run.chunks():
                put(dq[:, :, rows.start - shift : rows.stop - shift], self._flash(run, number, rows), alone)
        else:
            for tile in run_tiles(run, lists.query, lists.keys, lists.values, self.dkeys, self.dvalues):
                at, rows = tile.place, tile.rows
                lse = None if alone and len(tile.spans) == 1 else lists.lse[at]
                query, out = lists.query[at], lists.out[at]
                share = lists.step.tiled.backward(self.grad[at], query, tile.spans, out, lse, tile.empty)
                put(dq[tile.batch, tile.heads, rows.start - shift : rows.stop - shift], share, alone)
        if not lists.in_place:
            (write if alone else add)(self.dquery, _part(group.queries, run), group.repeat, dq)

    def _flash(self, run: Run, number: int, rows: slice) -> Tensor:
        lists = self.lists
        query, grad, out, lse = (x[:, :, rows] for x in (lists.query, self.grad, lists.out, lists.lse))
        dq = None
        for span in run.spans:
            part = span.keys(number)
            key, value = lists.keys[span.piece][:, :, part], lists.values[span.piece][:, :, part]
            scale = lists.step.tiled.scale
            share, dk, dv = flash_backward(grad, query, key, value, out, lse, causal=span.causal, scale=scale)
            self.dkeys[span.piece][:, :, part] += dk
            self.dvalues[span.piece][:, :, part] += dv
            dq = share if dq is None else dq + share
        assert dq is not None
        return dq

    def finish(self, dkey: Tensor, dvalue: Tensor) -> None:
        """Add what was not added in place."""
        group = self.lists.group
        for keys, dk, dv in zip(group.keys, self.dkeys, self.dvalues, strict=True):
            if not is_view(keys, group.repeat):
                add(dkey, keys, group.repeat, dk)
                add(dvalue, keys, group.repeat, dv)


def make_pass(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    call: Call,
    seed: int,
    want_lse: bool,
) -> Pass:
    """Return the walk for one sequence; `want_lse` where the backward pass will need the log-sum-exp."""
    schedule = _schedule(plan, call, query, key)
    scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
    return Pass(
        query, key, value, out, lse, schedule, Tiled(scale, call.softcap, call.dropout, seed), want_lse
    )


def needs_merging(plan: Plan, call: Call, query: Tensor, key: Tensor) -> bool:
    """True when some row's result comes from several groups of pieces and is merged in memory."""
    return not _schedule(plan, call, query, key).single


def _schedule(plan: Plan, call: Call, query: Tensor, key: Tensor) -> Schedule:
    fused = operator(call, query.device) == "flash+tiled"
    groups = query.shape[1] // key.shape[1]
    rows = max(16, _CPU_ROWS // groups) if query.device.type == "cpu" else _OTHER_ROWS
    return make_schedule(plan, rows, fused)


def _groups(schedule: Schedule) -> Iterator[Group]:
    """Yield the groups, families cut so that folding never copies more than an eighth of a tensor."""
    for group in schedule.groups:
        members = -(-group.repeat // 8)
        for first in range(0, group.repeat, members):
            if group.repeat == 1:
                yield group
                continue
            keys = tuple(_shifted(keys, first) for keys in group.keys)
            count = min(members, group.repeat - first)
            yield replace(group, queries=_shifted(group.queries, first), keys=keys, repeat=count)


def _shifted(indices: Lattice | IndexList, by: int) -> Lattice:
    assert isinstance(indices, Lattice)
    return replace(indices, first=indices.first + by)


def _part(indices: Lattice | IndexList, run: Run) -> Lattice | IndexList:
    """Return the indices of a run's rows."""
    rows = run.rows * run.repeat
    if isinstance(indices, IndexList):
        return IndexList(indices.indices[run.row : run.row + rows])
    return Lattice(indices.first + run.row * indices.step, rows, indices.step)
