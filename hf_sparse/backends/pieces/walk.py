"""One walk through a schedule, forward or backward: pieces computed one after the other and merged.

Long stretches without a mask (dense prefixes, residues of a stride) go through the fused flash operator; everything
else through cache-sized tiles. Given the merged output and the merged log-sum-exp each piece's backward pass is exact,
so training keeps q, k, v, the output and one number per row, and never a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...plan.plan import HeadPlan, Plan
from ..call import Call
from . import fused
from .families import run_members
from .gathered import run_gathered
from .lists import Lists, Tensors, members
from .runs import Run
from .schedule import MANY_MEMBERS, Group, Schedule, make_schedule
from .step import is_step
from .strips import in_strips, run_strips
from .tile import Tile
from .tiled import Tiled
from .tiles import run_tiles

# Query rows of a chunk, over all query heads of a key head. On a CPU fewer rows leave fewer masked pairs at the ends of
# a window, but below 64 the matrix products slow down.
_CPU_ROWS = 64
_OTHER_ROWS = 256


def operator(call: Call, device: torch.device, plans: list[Plan | None] | None = None) -> str:
    """Return what computes a call.

    "step": products over the keys that a single query reads; "flash+tiled": the fused operator serves spans without a
    mask, tiles the others; "tiled": tiles serve all.
    """
    if plans is not None and is_step(call, plans):
        return "step"
    return "flash+tiled" if device.type == "cpu" and not call.dropout and call.softcap is None else "tiled"


@dataclass
class Pass:
    """One walk through a schedule, for the heads of one plan on one sequence.

    first_head: place of query head 0 of the tensors in the plan's group of heads.
    is_fused: the fused operator computes what it can.
    shares_rows: other passes serve the same rows with other keys, or with the same ones seen from elsewhere, or a sink
        joins them.
    merges: one of them came before: what it gave is merged with, not overwritten.
    """

    schedule: Schedule
    first_head: int
    tiled: Tiled
    is_fused: bool
    shares_rows: bool = False
    merges: bool = False

    @property
    def alone(self) -> bool:
        """True where nothing is merged: each row's softmax is that of one tile, and can be taken anew from it."""
        return self.schedule.single and not self.shares_rows

    def forward(self, tensors: Tensors) -> None:
        """Write `out` and `lse`; rows that no key serves get 0 and -inf."""
        if not (self.schedule.covers or self.merges):
            tensors.out.zero_()
            tensors.lse.fill_(float("-inf"))
        want_lse = not self.alone
        for group, fused_runs, runs, first in self._groups():
            writes = first and not self.merges
            for run in fused_runs:
                fused.forward(run, group, tensors, self.tiled.scale, not writes)
            if _at_once(group, runs):
                for tile in self._of_members(group, runs, tensors):
                    tile.forward(self.tiled, tensors.query, tensors.out, tensors.lse, want_lse, not writes)
                continue
            for lists in members(group, tensors) if runs else ():
                for run in runs:
                    if not run.spans:
                        if writes:
                            _fill(run, lists.out, 0.0)
                            _fill(run, lists.lse, float("-inf"))
                        continue
                    for tile in self._tiles(run, lists):
                        tile.forward(self.tiled, lists.query, lists.out, lists.lse, want_lse, not writes)
        for plan_tiles in self.schedule.tiles:
            for tile in run_gathered(plan_tiles, self.first_head, tensors):
                tile.forward(self.tiled, tensors.query, tensors.out, tensors.lse, True, True)

    def backward(self, tensors: Tensors) -> None:
        """Write `dquery`, and add to `dkey` and `dvalue`."""
        assert tensors.grad is not None and tensors.dquery is not None
        alone = self.alone
        if not self.schedule.covers:
            tensors.dquery.zero_()
        for group, fused_runs, runs, writes in self._groups():
            for run in fused_runs:
                fused.backward(run, group, tensors, self.tiled.scale, writes)
            if _at_once(group, runs):
                for tile in self._of_members(group, runs, tensors):
                    rows = tensors.grad, tensors.query, tensors.out, tensors.lse, tensors.dquery
                    tile.backward(self.tiled, *rows, alone, writes)
                continue
            for lists in members(group, tensors) if runs else ():
                assert lists.grad is not None and lists.dquery is not None
                for run in runs:
                    if not run.spans:
                        _fill(run, lists.dquery, 0.0)
                        continue
                    for tile in self._tiles(run, lists):
                        rows = lists.grad, lists.query, lists.out, lists.lse, lists.dquery
                        tile.backward(self.tiled, *rows, alone, writes)
        for plan_tiles in self.schedule.tiles:
            for tile in run_gathered(plan_tiles, self.first_head, tensors):
                rows = tensors.grad, tensors.query, tensors.out, tensors.lse, tensors.dquery
                tile.backward(self.tiled, *rows, alone, False)

    def _groups(self) -> Iterator[tuple[Group, list[Run], list[Run], bool]]:
        """Yield the groups, their runs for the fused operator and for tiles, and whether they write or merge.

        Both passes see the same runs, whatever came before, and so draw the same dropout masks.
        """
        for number, group in enumerate(self.schedule.groups):
            writes = number < self.schedule.written
            mine = [run for run in group.runs if self.is_fused and fused.fits(run, group)]
            others = [run for run in group.runs if run not in mine and (run.spans or writes)]
            yield group, mine, others, writes

    def _of_members(self, group: Group, runs: list[Run], tensors: Tensors) -> Iterator[Tile]:
        for run in runs:
            assert not any(span.causal for span in run.spans)
            yield from run_members(run, group, tensors, bool(self.tiled.dropout))

    def _tiles(self, run: Run, lists: Lists) -> Iterator[Tile]:
        assert not any(span.causal for span in run.spans)  # only the fused operator knows triangles
        return run_strips(run, lists, bool(self.tiled.dropout)) if in_strips(run) else run_tiles(run, lists)


def make_pass(
    plan: HeadPlan,
    first_head: int,
    query: Tensor,
    key: Tensor,
    call: Call,
    seed: int,
    shares_rows: bool = False,
    merges: bool = False,
) -> Pass:
    """Return the walk for the heads of one plan; query [B, H, Q, D], key [B, H_kv, K, D] are those heads'."""
    scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
    tiled = Tiled(scale, call.softcap, call.dropout, seed)
    is_fused = operator(call, query.device) == "flash+tiled"
    return Pass(_schedule(plan, call, query, key), first_head, tiled, is_fused, shares_rows, merges)


def needs_merging(plan: HeadPlan, call: Call, query: Tensor, key: Tensor, q_len: int) -> bool:
    """True when some row's result comes from several groups of pieces and is merged in memory."""
    return not _schedule(plan, call, query[:, :, :q_len], key).single


def _schedule(plan: HeadPlan, call: Call, query: Tensor, key: Tensor) -> Schedule:
    groups = query.shape[1] // key.shape[1]
    rows = max(16, _CPU_ROWS // groups) if query.device.type == "cpu" else _OTHER_ROWS
    return make_schedule(plan, query.shape[2], rows, operator(call, query.device) == "flash+tiled")


def _at_once(group: Group, runs: list[Run]) -> bool:
    """True where the members of a family are computed together: enough of them, and rows that all see something."""
    return group.repeat >= MANY_MEMBERS and bool(runs) and all(run.spans for run in runs)


def _fill(run: Run, x: Tensor, value: float) -> None:
    for _, rows in run.chunks():
        x[:, :, rows] = value
