"""Segments: padding and packed samples turned into plain sequences before anything is planned.

A batch of keys [B, K] is a set of sequences. Each sequence occupies an increasing list of slots in one or more equal
rows; the position of a token is its place in that list, so padding shifts positions and packed samples restart them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Columns:
    """Positions [c] int64, ascending, of the keys that a cache still holds from before a gap.

    Compared by identity, so that segments which share one also share their plans.
    """

    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True, eq=False)
class Segment:
    """The slots that hold one sequence, the same in each of `rows`.

    rows: batch rows.
    slots: key slots, a slice, or an int64 tensor [n] where other slots lie between them.
    first: position of the first slot's token that is not among `columns`; more than 0 where a cache has dropped earlier
        tokens. From it on, positions go up by 1.
    chosen: the positions of this sequence that are global, ascending.
    columns: earlier positions, held in the first slots; all are below `first`. None where there are none.
    """

    rows: slice
    slots: slice | Tensor
    first: int = 0
    chosen: tuple[int, ...] = ()
    columns: Columns | None = None

    @property
    def positions(self) -> np.ndarray:
        """The positions of all slots, int64 [n]."""
        tail = np.arange(self.first, self.end)
        return tail if self.columns is None else np.concatenate((self.columns.positions, tail))

    @property
    def end(self) -> int:
        """One past the position of the last slot's token."""
        return self.first + self.length - (0 if self.columns is None else len(self.columns))

    @property
    def length(self) -> int:
        if isinstance(self.slots, slice):
            return self.slots.stop - self.slots.start
        return int(self.slots.numel())

    def queries(self, q_len: int, k_len: int) -> slice | Tensor:
        """Return the query indices of this sequence in a call whose queries are the last `q_len` slots."""
        behind = k_len - q_len
        if isinstance(self.slots, slice):
            return slice(max(self.slots.start - behind, 0), max(self.slots.stop - behind, 0))
        return self.slots[self.slots >= behind] - behind

    def queries_in(self, q_len: int, k_len: int) -> int:
        """Return how many queries of such a call are of this sequence."""
        at = self.queries(q_len, k_len)
        return at.stop - at.start if isinstance(at, slice) else len(at)


@dataclass(frozen=True, eq=False)
class Segments:
    """All sequences of a batch.

    batch, k_len: shape of the keys, rows and slots.
    entries: the sequences; slots in none of them are padding, which sees nothing and is seen by nothing.
    memo: what was worked out for these sequences: the layers of a forward pass share it.
    """

    batch: int
    k_len: int
    entries: tuple[Segment, ...] = field(default=())
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __reduce__(self) -> Any:  # what was worked out is not copied or saved
        return Segments, (self.batch, self.k_len, self.entries)

    @staticmethod
    def whole(batch: int, k_len: int, first: int = 0) -> Segments:
        """One sequence per row, without padding."""
        return Segments(batch, k_len, (Segment(slice(0, batch), slice(0, k_len), first),))

    @staticmethod
    def from_mask(mask: Tensor, dropped: Tensor | None = None) -> Segments:
        """One sequence per row from a padding mask.

        Args:
            mask: [B, K] bool, True = a real token, on either or both sides, holes included.
            dropped: [B] int64, the real tokens of each row that came before slot 0 and are no longer held.
        """
        return Segments.from_labels(torch.where(mask, 0, -1), dropped)

    @staticmethod
    def from_labels(labels: Tensor, dropped: Tensor | None = None) -> Segments:
        """Sequences from a label per slot; equal labels of a row are one sequence.

        Args:
            labels: [B, K] int64, -1 = padding.
            dropped: [B] int64 as in `from_mask`.
        """
        table = labels.cpu().numpy()
        before = np.zeros(len(table), dtype=np.int64) if dropped is None else dropped.cpu().numpy()
        batch, k_len = table.shape
        entries: list[Segment] = []
        row = 0
        while row < batch:
            stop = row + 1
            while stop < batch and before[stop] == before[row] and np.array_equal(table[stop], table[row]):
                stop += 1
            for slots in _sequences(table[row]):
                entries.append(Segment(slice(row, stop), slots, int(before[row])))
            row = stop
        return Segments(batch, k_len, tuple(entries))

    def choose(self, chosen: Tensor) -> Segments:
        """Return the same sequences with their global tokens; rows of a sequence that differ in them are divided.

        Args:
            chosen: [B, K] bool, True = global; padding is never.
        """
        table = chosen.cpu().numpy()
        entries: list[Segment] = []
        for segment in self.entries:
            slots = segment.slots if isinstance(segment.slots, slice) else segment.slots.numpy()
            row = segment.rows.start
            while row < segment.rows.stop:
                stop = row + 1
                while stop < segment.rows.stop and np.array_equal(table[stop][slots], table[row][slots]):
                    stop += 1
                positions = segment.positions[np.flatnonzero(table[row][slots])]
                entries.append(replace(segment, rows=slice(row, stop), chosen=tuple(positions.tolist())))
                row = stop
        return Segments(self.batch, self.k_len, tuple(entries))

    def after(self, slot: int) -> Segments:
        """Return what is left of sequences without columns from `slot` on; slots count from there."""
        if slot == 0:
            return self
        entries = []
        for segment in self.entries:
            slots: slice | Tensor
            assert segment.columns is None
            if isinstance(segment.slots, slice):
                start = min(max(segment.slots.start, slot), segment.slots.stop)
                gone, slots = start - segment.slots.start, slice(start - slot, segment.slots.stop - slot)
                slots = slots if slots.stop > slots.start else slice(0, 0)
            else:
                gone = int((segment.slots < slot).sum())
                slots = segment.slots[gone:] - slot
            entries.append(replace(segment, slots=slots, first=segment.first + gone))
        return Segments(self.batch, self.k_len - slot, tuple(entries))

    @property
    def is_whole(self) -> bool:
        """True when every slot of every row is one sequence: nothing has to be cut."""
        if len(self.entries) != 1:
            return False
        only = self.entries[0]
        return only.rows == slice(0, self.batch) and only.slots == slice(0, self.k_len)


def _sequences(labels: np.ndarray) -> list[slice | Tensor]:
    """Return the slots of each label >= 0 of one row [K], in order of first appearance."""
    edges = np.flatnonzero(np.diff(labels)) + 1
    starts = np.concatenate(([0], edges))
    stops = np.concatenate((edges, [len(labels)]))
    runs: dict[int, list[tuple[int, int]]] = {}
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        if stop > start and labels[start] >= 0:
            runs.setdefault(int(labels[start]), []).append((start, stop))
    sequences: list[slice | Tensor] = []
    for pieces in runs.values():
        if len(pieces) == 1:
            sequences.append(slice(*pieces[0]))
        else:
            sequences.append(torch.cat([torch.arange(start, stop) for start, stop in pieces]))
    return sequences
