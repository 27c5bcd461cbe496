"""How the keys that one query per row reads are taken from memory: views where they can be, small gathers elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ...plan.segments import Segment
from ...plan.step import Reads

# Slots of a view per key that a row reads, up to which a mask over the view is used instead of a gather.
_WIDEST = 2
_BAGS = (-1,)


@dataclass(frozen=True, eq=False)
class Fetch:
    """Keys of a block of heads: query heads, and key heads of which each serves G of them.

    slots: a slice, or int64 [m]: the same for all rows and heads; or int64 [R or 1, H_kv or 1, G or 1, m], -1 where a
        row reads fewer: there a slot that is masked, the last one when this was made.
    allowed: bool [R or 1, H_kv or 1, G or 1, m], True = read; None where all are.
    """

    slots: slice | Tensor
    allowed: Tensor | None = None
    _places: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @property
    def is_view(self) -> bool:
        """True where the keys are a view that every row reads whole."""
        return isinstance(self.slots, slice) and self.allowed is None

    def of(self, heads: slice, kv_heads: slice, groups: int) -> Fetch:
        """Return what some query heads take of a gather of all: those of the key heads `kv_heads`."""
        assert isinstance(self.slots, Tensor) and self.slots.dim() == 4
        count = len(range(heads.start, heads.stop, heads.step)) // len(
            range(kv_heads.start, kv_heads.stop, kv_heads.step)
        )
        places = torch.arange(heads.start, heads.stop, heads.step)[:count] % groups
        slots = self.slots[:, kv_heads]
        if slots.shape[2] > 1:
            slots = slots[:, :, places]
        return Fetch(slots, None if self.allowed is None else slots >= 0)

    def scores(self, query: Tensor, key: Tensor, rows: slice | Tensor, heads: slice) -> Tensor:
        """Return query [R, H, D] times the keys it reads of key [B, H_kv, K, D], [R, h_kv, G, m].

        On a CPU where each query head has keys of its own these are read where they lie too.
        """
        if found := self._read_in_place(key, query, rows, heads):
            tokens, places = found
            if query.shape[1] == places.shape[1]:
                # What a sum with weights gives its weights as gradients: products with the tokens, none of them copied.
                bags = self._bags(places)
                products = torch.ops.aten._embedding_bag_per_sample_weights_backward
                flat = products(query.flatten(0, 1).contiguous(), tokens, places.flatten(), bags[:0], bags, 0)
                return flat.view(places.shape)
        own = self.take(key, rows, heads).to(query.dtype)
        # The query heads that share a list of keys are rows of one product.
        return (query.unflatten(1, (own.shape[1], own.shape[2], -1)) @ own.mT).flatten(2, 3)

    def sums(self, weights: Tensor, value: Tensor, rows: slice | Tensor, heads: slice) -> Tensor:
        """Return weights [R, h_kv, G, m] times the values that are read of value [B, H_kv, K, Dv], [R, h_kv, G, Dv].

        On a CPU what is gathered, and not differentiated, is summed where it lies, without a copy.
        """
        if found := self._read_in_place(value, weights, rows, heads):
            tokens, places = found
            places = places.expand(weights.shape).flatten(0, 2)
            summed = embedding_bag(places, tokens, mode="sum", per_sample_weights=weights.flatten(0, 2))
            return summed.view(*weights.shape[:3], value.shape[3])
        own = self.take(value, rows, heads).to(weights.dtype)
        return (weights.unflatten(2, (own.shape[2], -1)) @ own).flatten(2, 3)

    def take(self, x: Tensor, rows: slice | Tensor, heads: slice) -> Tensor:
        """Return the tokens of some rows and key heads of x [B, H_kv, K, D] as [R, H_kv, G or 1, m, D]."""
        if isinstance(self.slots, slice):
            return x[rows, heads, self.slots].unsqueeze(2)
        if self.slots.dim() == 1:
            return x[rows, heads].index_select(2, self.slots).unsqueeze(2)
        if not x.requires_grad and (found := self._tokens(x, rows, heads)) is not None:
            tokens, places = found
            return tokens.index_select(0, places.flatten()).view(*places.shape, -1)
        row, head = _numbers(x, rows, heads)
        return x[row[:, None, None, None], head[:, None, None], self.slots]

    def _bags(self, places: Tensor) -> Tensor:
        """Return for each of `places` [R, H, 1, m] the number of its row and head, int64 [R * H * m]."""
        if _BAGS not in self._places:
            numbers = torch.arange(places.shape[:2].numel())
            self._places[_BAGS] = numbers.repeat_interleave(places.shape[3])
        return self._places[_BAGS]

    def _read_in_place(
        self, x: Tensor, other: Tensor, rows: slice | Tensor, heads: slice
    ) -> tuple[Tensor, Tensor] | None:
        """Return `_tokens` of what is gathered on a CPU, in the type of `other`, and not differentiated; else None."""
        is_gather = isinstance(self.slots, Tensor) and self.slots.dim() == 4
        if not is_gather or x.device.type != "cpu" or x.dtype != other.dtype:
            return None
        if torch.is_grad_enabled() and (x.requires_grad or other.requires_grad):
            return None
        return self._tokens(x, rows, heads)

    def _tokens(self, x: Tensor, rows: slice | Tensor, heads: slice) -> tuple[Tensor, Tensor] | None:
        """Return x as a list of tokens [n, D], and the places there of those that are read, [R, H_kv, G or 1, m].

        None where tokens do not lie so that they can be listed. One long index is several times faster than three.
        """
        size = x.shape[3]
        if x.stride(3) != 1 or any(stride % size for stride in x.stride()[:3]):
            return None
        steps = [stride // size for stride in x.stride()[:3]]
        count = 1 + sum(step * (length - 1) for step, length in zip(steps, x.shape, strict=False))
        known = (*steps, size)
        if known not in self._places:
            assert isinstance(self.slots, Tensor)
            row, head = _numbers(x, rows, heads)
            slots = torch.where(
                self.slots < 0, x.shape[2] - 1, self.slots
            )  # the query's own, which is no nan
            starts = row[:, None, None, None] * steps[0] + head[:, None, None] * steps[1]
            self._places[known] = starts + slots * steps[2]
        return x.as_strided((count, size), (size, 1)), self._places[known]


def _numbers(x: Tensor, rows: slice | Tensor, heads: slice) -> list[Tensor]:
    """Return the numbers of some rows and key heads of x [B, H_kv, K, D]."""
    own = zip(x.shape[:2], (rows, heads), strict=True)
    return [torch.arange(size, device=x.device)[part] for size, part in own]


def fetches_of(
    sequences: Sequence[tuple[Segment, Reads | None]], heads: range, kv_heads: int, device: torch.device
) -> tuple[Fetch, ...]:
    """Return how the keys of some heads are read, in disjoint fetches.

    Args:
        sequences: those with a query, and what it reads; None where it reads nothing.
        heads: query heads, which share what they read or are drawn keys of their own; `kv_heads` key heads serve them.
    """
    if len(sequences) == 1 and isinstance(sequences[0][0].slots, slice):
        return _of_one(*sequences[0], heads, kv_heads, device)
    own = heads if any(reads is not None and _is_drawn(reads) for _, reads in sequences) else heads[:1]
    table = _table([[_slots(segment, reads, head) for head in own] for segment, reads in sequences])
    table = np.repeat(table, [segment.rows.stop - segment.rows.start for segment, _ in sequences], 0)
    return _of_rows(table, kv_heads, device)


def _of_one(
    segment: Segment, reads: Reads | None, heads: range, kv_heads: int, device: torch.device
) -> tuple[Fetch, ...]:
    assert isinstance(segment.slots, slice)
    if reads is None:
        return ()
    start = segment.slots.start
    fetches = [Fetch(slice(start + r.start, start + r.stop, r.step)) for r in reads.ranges]
    if reads.listed is not None:
        numbers = [reads.heads.index(head) for head in heads] if _is_drawn(reads) else [0]
        listed = reads.listed[numbers]
        fetches.append(_gather(np.where(listed < 0, -1, listed + start)[None], kv_heads, device))
    return tuple(fetches)


def _of_rows(table: np.ndarray, kv_heads: int, device: torch.device) -> tuple[Fetch, ...]:
    """Return how rows read the slots of a table [R, H or 1, m], -1 where one has fewer."""
    if not table.size:
        return ()
    row, head, _ = place = np.nonzero(table >= 0)
    slots = table[place]
    low, stop = int(slots.min()), int(slots.max()) + 1
    if stop - low <= _WIDEST * table.shape[2]:
        read = np.zeros((*table.shape[:2], stop - low), dtype=bool)
        read[row, head, slots - low] = True
        allowed = None if read.all() else _by_key_head(read, kv_heads, device)
        return (Fetch(slice(low, stop), allowed),)
    common = _run_of_all(table)
    rest = np.where((table >= common.start) & (table < common.stop), -1, table)
    fetches = [Fetch(common)] if common.stop > common.start else []
    width = int((rest >= 0).sum(2).max())
    if width:
        fetches.append(_gather(-np.sort(-rest, 2)[..., :width], kv_heads, device))
    return tuple(fetches)


def _run_of_all(table: np.ndarray) -> slice:
    """Return the longest run of neighbouring slots that every row of the table reads."""
    slots, times = np.unique(table[table >= 0], return_counts=True)
    everywhere = slots[times == table.shape[0] * table.shape[1]]
    runs = np.split(everywhere, np.flatnonzero(np.diff(everywhere) > 1) + 1)
    longest = max(runs, key=len)
    return slice(int(longest[0]), int(longest[-1]) + 1) if len(longest) else slice(0, 0)


def _gather(table: np.ndarray, kv_heads: int, device: torch.device) -> Fetch:
    slots = _by_key_head(table, kv_heads, device)
    if (table < 0).any():
        return Fetch(slots, slots >= 0)
    return Fetch(slots.flatten() if slots.shape[:3].numel() == 1 else slots)


def _by_key_head(table: np.ndarray, kv_heads: int, device: torch.device) -> Tensor:
    """Return a table [R, H or 1, m] as a tensor [R, H_kv or 1, G or 1, m]."""
    rows, heads, width = table.shape
    by_key_head = table.reshape(rows, kv_heads if heads > 1 else 1, -1, width)
    return torch.from_numpy(by_key_head).to(device, non_blocking=True)


def _slots(segment: Segment, reads: Reads | None, head: int) -> np.ndarray:
    keys = np.empty(0, dtype=np.int64) if reads is None else reads.keys_of(head)
    return keys + segment.slots.start if isinstance(segment.slots, slice) else segment.slots.numpy()[keys]


def _table(lists: list[list[np.ndarray]]) -> np.ndarray:
    """Return lists of slots as one table [R, H, m], -1 where a list is shorter."""
    width = max(len(slots) for own in lists for slots in own)
    table = np.full((len(lists), len(lists[0]), width), -1, dtype=np.int64)
    for row, own in zip(table, lists, strict=True):
        for place, slots in zip(row, own, strict=True):
            place[: len(slots)] = slots
    return table


def _is_drawn(reads: Reads) -> bool:
    """True where each of the heads has a list of its own."""
    return reads.listed is not None and len(reads.listed) > 1
