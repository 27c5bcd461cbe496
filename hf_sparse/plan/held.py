"""What the slots of a cache hold: sequences that grow with every call and of which keys are dropped for good.

Nothing here touches a key: the layers of a cache that share a pattern share one account of their slots, which tells for
each call what the keys are (`Step.call`) and which of them stay (`Step.kept`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .retention import Retention
from .segments import Columns, Segment, Segments

SLACK = 128  # slots of a buffer beyond what must be held: keys are dropped that many at a time


@dataclass(frozen=True, eq=False)
class Held:
    """What a cache holds between two calls.

    segments: the sequences in the slots.
    room: slots of the buffers.
    undo: slots that came since keys were last dropped; as many can be taken back.
    """

    segments: Segments
    room: int = 0
    undo: int = 0

    @staticmethod
    def nothing(batch: int) -> Held:
        return Held(Segments(batch, 0, (Segment(slice(0, batch), slice(0, 0)),)))

    @property
    def length(self) -> int:
        """Slots in use."""
        return self.segments.k_len


@dataclass(frozen=True, eq=False)
class Step:
    """One call of a model on a cache.

    call: the keys during the call, those held before in front of the new ones.
    kept: the slots of `call` that stay, int64 [T] for all rows or [B, T]; None where all stay in place.
    """

    before: Held
    call: Segments
    after: Held
    kept: Tensor | None = None


RetentionOf = Callable[[tuple[int, ...]], Retention]


def next_step(
    held: Held,
    q_len: int,
    retention: RetentionOf,
    *,
    real: np.ndarray | None = None,
    chosen: np.ndarray | None = None,
    record: bool = False,
) -> Step:
    """Return what a call of `q_len` new tokens does.

    Args:
        retention: gives what stays of a sequence with these global positions.
        real: bool [B, Q], False = padding; None is all real.
        chosen: bool [B, Q], True = the token is global; None is none.
        record: drop nothing, so that the tokens can be taken back.
    """
    call = extend(held.segments, q_len, real, chosen)
    undo = held.undo + q_len
    if call.k_len <= held.room:
        return Step(held, call, Held(call, held.room, undo))
    after, kept = (call, None) if record else drop(call, retention)
    return Step(held, call, Held(after, after.k_len + SLACK, undo if kept is None else 0), kept)


def take_back(held: Held, count: int) -> Held:
    """Return what was held `count` slots earlier.

    Raises:
        ValueError: keys were dropped since.
    """
    if count > held.undo:
        raise ValueError(
            f"{count} tokens are to be taken back but keys that the sequence then needs were dropped {held.undo} "
            f"tokens ago; call activate_past_recording() on the cache before the tokens, or use a DynamicCache"
        )
    length = held.length - count
    entries = tuple(_first_slots(segment, length) for segment in held.segments.entries)
    return Held(Segments(held.segments.batch, length, entries), held.room, held.undo - count)


def take_rows(held: Held, rows: list[int]) -> Held:
    """Return what is held once row i of every buffer is what row ``rows[i]`` was."""
    owner = {
        row: entry for entry in held.segments.entries for row in range(entry.rows.start, entry.rows.stop)
    }
    entries: list[Segment] = []
    source: Segment | None = None
    for new, old in enumerate(rows):
        if owner[old] is source:
            entries[-1] = replace(entries[-1], rows=slice(entries[-1].rows.start, new + 1))
        else:
            source = owner[old]
            entries.append(replace(source, rows=slice(new, new + 1)))
    return replace(held, segments=Segments(len(rows), held.length, tuple(entries)))


def extend(held: Segments, q_len: int, real: np.ndarray | None, chosen: np.ndarray | None) -> Segments:
    """Return the sequences with `q_len` slots more; rows that go on differently are divided."""
    entries: list[Segment] = []
    for segment in held.entries:
        for rows in _alike(segment.rows, real, chosen):
            tokens = np.arange(q_len) if real is None else np.flatnonzero(real[rows.start])
            slots = _joined(segment.slots, held.k_len, q_len, tokens)
            made = segment.chosen
            if chosen is not None:
                begin = segment.first + segment.length - _columns(segment)
                made += tuple((begin + np.flatnonzero(chosen[rows.start][tokens])).tolist())
            entries.append(Segment(rows, slots, segment.first, made, segment.columns))
    return Segments(held.batch, held.k_len + q_len, tuple(entries))


def drop(call: Segments, retention: RetentionOf) -> tuple[Segments, Tensor | None]:
    """Return what stays of the sequences once no query of theirs is running, and in which slots it was.

    Shorter rows are moved to the right, their first slots hold nothing.
    """
    stays = [_stays(segment, retention(segment.chosen)) for segment in call.entries]
    length = max((len(slots) for _, slots in stays), default=0)
    if length == call.k_len:
        return call, None
    entries = []
    for segment, (made, slots) in zip(call.entries, stays, strict=True):
        entries.append(replace(made, rows=segment.rows, slots=slice(length - len(slots), length)))
    after = Segments(call.batch, length, tuple(entries))
    if len(stays) == 1 and len(stays[0][1]) == length:
        return after, torch.from_numpy(stays[0][1])
    kept = np.zeros((call.batch, length), dtype=np.int64)
    for segment, (_, slots) in zip(call.entries, stays, strict=True):
        kept[segment.rows, length - len(slots) :] = slots
    return after, torch.from_numpy(kept)


def _stays(segment: Segment, retention: Retention) -> tuple[Segment, np.ndarray]:
    """Return what stays of a sequence, its slots apart, and these: int64, ascending."""
    slots = (
        np.arange(segment.slots.start, segment.slots.stop)
        if isinstance(segment.slots, slice)
        else segment.slots.numpy()
    )
    count = _columns(segment)
    end = segment.first + segment.length - count
    first = min(max(retention.tail(end), segment.first), end)
    early = segment.positions[: count + first - segment.first]
    kept = retention.keeps(early, end)
    columns = segment.columns
    if not kept.all() or len(early) > count:
        columns = Columns(early[kept]) if kept.any() else None
    made = replace(segment, first=first, columns=columns)
    return made, np.concatenate((slots[: len(early)][kept], slots[len(early) :]))


def _columns(segment: Segment) -> int:
    return 0 if segment.columns is None else len(segment.columns)


def _alike(rows: slice, real: np.ndarray | None, chosen: np.ndarray | None) -> list[slice]:
    """Divide rows where the new tokens are padded or chosen differently."""
    cuts = [rows.start]
    for row in range(rows.start + 1, rows.stop):
        if any(x is not None and not np.array_equal(x[row], x[row - 1]) for x in (real, chosen)):
            cuts.append(row)
    return [slice(a, b) for a, b in zip(cuts, [*cuts[1:], rows.stop], strict=True)]


def _joined(slots: slice | Tensor, behind: int, q_len: int, tokens: np.ndarray) -> slice | Tensor:
    """Return a sequence's slots and those of its new tokens, a slice where they follow each other."""
    if len(tokens) == 0:
        return slots
    begin, stop = behind + int(tokens[0]), behind + int(tokens[-1]) + 1
    if isinstance(slots, slice) and stop - begin == len(tokens):
        if slots.stop == slots.start:
            return slice(begin, stop)
        if slots.stop == begin:
            return slice(slots.start, stop)
    held = torch.arange(slots.start, slots.stop) if isinstance(slots, slice) else slots
    return torch.cat((held, torch.from_numpy(behind + tokens)))


def _first_slots(segment: Segment, length: int) -> Segment:
    """Return the sequence as far as it lies in the first `length` slots."""
    if isinstance(segment.slots, slice):
        stop = min(segment.slots.stop, length)
        slots: slice | Tensor = slice(min(segment.slots.start, stop), stop)
    else:
        slots = segment.slots[segment.slots < length]
    end = (
        segment.first
        + (slots.stop - slots.start if isinstance(slots, slice) else len(slots))
        - _columns(segment)
    )
    return replace(segment, slots=slots, chosen=tuple(p for p in segment.chosen if p < end))
