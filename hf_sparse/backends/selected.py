"""The selected blocks of a call: sequence by sequence, without the pairs that its static pattern holds already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..patterns.base import Context, Pattern
from ..plan.constraint import Constraint
from ..plan.segments import Segments
from ..selectors import AnySelection, BucketSelection, Division, Index, Selection, Selector
from ..selectors.buckets import BucketTiles
from .call import Call, CallRecord

# Added to the score of a token with itself that is to be read only if nothing else is. Reformer has -100,000 in
# float32, with which the log-sum-exps of such rows are exact to 1/128 only, and -1,000 in half precision.
ALONE = -1e3


@dataclass(frozen=True, eq=False)
class Selected:
    """What was selected for one sequence, and which pairs of it count.

    begin, end: positions of the first query and one past the last.
    first: position of the first key.
    others: what the call reads by position besides the kept blocks of the selector; None where there is nothing.
    constraint: the host's; causality always holds for selected blocks.
    context: what `others` is told.
    """

    selection: AnySelection
    begin: int
    end: int
    first: int
    others: Pattern | None
    constraint: Constraint
    context: Context

    @property
    def device(self) -> torch.device:
        own = self.selection
        return own.key.device if isinstance(own, BucketSelection) else own.lists.device

    @property
    def listed(self) -> Selection:
        """What was selected, of a selector that lists blocks."""
        assert isinstance(self.selection, Selection)
        return self.selection

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
        device = self.device
        query = torch.arange(self.begin, self.end, device=device) if query is None else query
        key = torch.arange(self.first, self.end, device=device)
        pairs = self.selection.mask(heads, query, key)
        if not self.is_masked:
            return pairs
        head = torch.arange(heads, device=device)[:, None, None]
        return pairs & self.counts(head, query[:, None], key)

    def bias(self, heads: int) -> Tensor | None:
        """Return what is added to the scores [R, H, Q, K] of pairs that count; None for nothing. For the reference."""
        if not isinstance(self.selection, BucketSelection) or not self.selection.is_counted:
            return None
        query = torch.arange(self.begin, self.end, device=self.selection.key.device)
        key = torch.arange(self.first, self.end, device=query.device)
        found = self.selection.counts(heads, query, key).clamp(min=1).double().log()
        return found + ALONE * (query[:, None] == key)

    def pairs(self, heads: int) -> int:
        """Return the pairs that count, over all rows and heads; waits for the device."""
        if isinstance(self.selection, BucketSelection):
            return self._pairs_in_buckets(self.selection, heads)
        return self._pairs_of_lists(self.selection, heads)

    def _pairs_of_lists(self, own: Selection, heads: int) -> int:
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

    def _pairs_in_buckets(self, own: BucketSelection, heads: int) -> int:
        shared, total = heads // own.key.shape[1], 0
        for row in range(len(own.key)):
            for head in range(heads):
                for tiles in own.tiles(row, head, head // shared):
                    total += int(self.pairs_of(tiles, head).sum())
        return total

    def pairs_of(self, tiles: BucketTiles, head: int) -> Tensor:
        """Return the pairs of tiles that count, bool [T, C, S]."""
        query, key = tiles.query[:, :, None] + self.begin, tiles.key[:, None]
        number = torch.full((), head, device=query.device)
        return tiles.pairs & (key >= self.first) & self.counts(number, query, key)


def select_all(
    selector: Selector,
    query: Tensor,
    key: Tensor,
    segments: Segments,
    constraint: Constraint,
    indexes: Sequence[Index[Any]] | None = None,
) -> list[AnySelection | None]:
    """Return what each sequence of a batch selects; None for one without queries, and for all of a batch without rows.

    Args:
        query: [B, H, Q, D]; key: [B, H_kv, K, D].
        indexes: what the earlier tokens of each sequence left behind; None where all are in this call.
    Raises:
        ValueError: earlier tokens without an index.
    """
    found: list[AnySelection | None] = []
    q_len, k_len = query.shape[2], key.shape[2]
    for number, segment in enumerate(segments.entries):
        if not (len(query) and segment.queries_in(q_len, k_len)):
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
    selections: Sequence[AnySelection | None],
    heads: int,
    q_len: int,
) -> list[Selected | None] | None:
    """Return the selections of a call with what is needed to compute them; None for a sequence that has none.

    None for all where no sequence has any.
    """
    made: list[Selected | None] = []
    for segment, selection in zip(segments.entries, selections, strict=True):
        if selection is None or selection.is_empty:
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


def counts_pairs(selections: Iterable[AnySelection | None] | None) -> bool:
    """True where pairs may count more than once, and a token itself less, which the step of one query does not do."""
    return any(isinstance(own, BucketSelection) and own.is_counted for own in selections or ())


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
