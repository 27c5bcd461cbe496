"""The selected blocks of a call: sequence by sequence, without the pairs that its static pattern holds already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..patterns.base import Context, Pattern
from ..plan.constraint import Constraint
from ..plan.segments import Segments
from ..selectors import Division, Index, Selection, Selector
from .call import Call, CallRecord


@dataclass(frozen=True, eq=False)
class Selected:
    """What was selected for one sequence, and which pairs of it count.

    begin, end: positions of the first query and one past the last.
    first: position of the first key.
    others: what the call reads by position besides the kept blocks of the selector; None where there is nothing.
    constraint: the host's; causality always holds for selected blocks.
    context: what `others` is told.
    """

    selection: Selection
    begin: int
    end: int
    first: int
    others: Pattern | None
    constraint: Constraint
    context: Context

    @property
    def is_masked(self) -> bool:
        """True where some pair of a selected block does not count."""
        limited = self.constraint.window is not None or self.constraint.chunk is not None
        return self.others is not None or limited

    def counts(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Tell which pairs of selected blocks count, for int64 heads and positions that broadcast."""
        counted = self.constraint.admits(query, key)
        if self.others is not None:
            counted = counted & ~self.others.allows(self.context, head, query, key)
        return counted

    def mask(self, heads: int, query: Tensor | None = None) -> Tensor:
        """Return the pairs [R, H, Q, K] that count with all keys, quadratic.

        query: int64 [Q], positions of the queries asked about; None for all of the call.
        """
        device = self.selection.lists.device
        query = torch.arange(self.begin, self.end, device=device) if query is None else query
        key = torch.arange(self.first, self.end, device=device)
        pairs = self.selection.mask(heads, query, key)
        if not self.is_masked:
            return pairs
        head = torch.arange(heads, device=device)[:, None, None]
        return pairs & self.counts(head, query[:, None], key)

    def pairs(self, heads: int) -> int:
        """Return the pairs that count, over all rows and heads; waits for the device."""
        own = self.selection
        rows, groups, blocks, most = own.lists.shape
        shared, total = heads // groups, 0
        for number in range(blocks if most else 0):
            first, stop = own.rows(number, number + 1, self.begin, self.end)
            lists = own.lists[:, :, number]
            if not self.is_masked:
                total += int((lists >= 0).sum()) * own.key_block * (stop - first) * shared
                continue
            keys, real = own.positions(lists)
            query = torch.arange(first, stop, device=keys.device)[:, None] + self.begin
            head = torch.arange(heads, device=keys.device).view(1, groups, shared, 1, 1)
            pair = self.counts(head, query, keys[:, :, None, None]) & real[:, :, None, None]
            total += int(pair.expand(rows, groups, shared, stop - first, -1).sum())
        return total


def select_all(
    selector: Selector,
    query: Tensor,
    key: Tensor,
    segments: Segments,
    constraint: Constraint,
    indexes: Sequence[Index[Any]] | None = None,
) -> list[Selection | None]:
    """Return what each sequence of a batch selects; None for one without queries.

    Args:
        query: [B, H, Q, D]; key: [B, H_kv, K, D].
        indexes: what the earlier tokens of each sequence left behind; None where all are in this call.
    Raises:
        ValueError: earlier tokens without an index.
    """
    found: list[Selection | None] = []
    q_len, k_len = query.shape[2], key.shape[2]
    for number, segment in enumerate(segments.entries):
        if not segment.queries_in(q_len, k_len):
            found.append(None)
            continue
        index = selector.index() if indexes is None else indexes[number]
        own = query[segment.rows, :, segment.queries(q_len, k_len)]
        read = key[segment.rows, :, segment.slots]
        found.append(index.select(own, read, segment.first, constraint.bounds()[0]))
    return found


def selected_of(
    division: Division,
    call: Call,
    segments: Segments,
    selections: Sequence[Selection | None],
    heads: int,
    q_len: int,
) -> list[Selected | None] | None:
    """Return the selections of a call with what is needed to compute them; None for a sequence that has none.

    None for all where no sequence has any.
    """
    made: list[Selected | None] = []
    for segment, selection in zip(segments.entries, selections, strict=True):
        if selection is None or not selection.lists.shape[3]:
            made.append(None)
            continue
        others = division.others
        context = call.constraint.context(
            call.pattern if others is None else others,
            layer=call.layer,
            heads=heads,
            length=segment.end,
            chosen=segment.chosen,
        )
        begin = segment.end - segment.queries_in(q_len, segments.k_len)
        made.append(Selected(selection, begin, segment.end, segment.first, others, call.constraint, context))
    return made if any(made) else None


def count_selected(made: CallRecord, selected: Sequence[Selected | None] | None, heads: int) -> None:
    """Add to the record of a call what it reads of selected blocks."""
    for chosen in selected or ():
        if chosen is not None:
            made.pairs += chosen.pairs(heads)
            made.pieces += 1


def check_selector(call: Call, far: tuple[Tensor, Tensor] | None, selector: Selector) -> None:
    """Raise ValueError unless blocks can be selected in such a call."""
    if far is not None or call.near is not None:
        raise ValueError(f"{selector} selects among keys at their own places; leave near and far at None")
    if not call.constraint.causal:
        raise ValueError(
            f"{selector} selects for causal attention, got {call.constraint}; use a static pattern in encoders"
        )
