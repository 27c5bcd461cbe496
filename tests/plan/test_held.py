"""The account of a cache's slots agrees with Python lists to which the same is done."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns.definitions import HEADS, named

from hf_sparse import (
    Longformer,
    SlidingWindow,
    SparseTransformerFixed,
    StreamingLLM,
    Strided,
)
from hf_sparse.patterns import static_patterns
from hf_sparse.plan import Constraint
from hf_sparse.plan import held as module
from hf_sparse.plan.held import Held, next_step, take_back, take_rows
from hf_sparse.plan.retention import Retention

PAD = None
PATTERNS = [
    SlidingWindow(window=3),
    StreamingLLM(sinks=2, window=3),
    Longformer(window=2, global_tokens=(0, 4)),
    SparseTransformerFixed(block=4, summary=1),
    Strided(stride=3, anchor="absolute"),
    Strided(stride=3),
]


@pytest.fixture(autouse=True)
def small_slack(monkeypatch):
    monkeypatch.setattr(module, "SLACK", 3)


def retention_of(pattern):
    return functools.lru_cache(lambda chosen: Retention(pattern, Constraint(), HEADS, 0, chosen))


def places(segments) -> list[list]:
    """Return the position in each slot of each row, PAD where it belongs to no sequence."""
    rows = [[PAD] * segments.k_len for _ in range(segments.batch)]
    for segment in segments.entries:
        slots = segment.slots
        slots = range(slots.start, slots.stop) if isinstance(slots, slice) else slots.tolist()
        assert len(slots) == len(segment.positions) == segment.length
        for row in range(segment.rows.start, segment.rows.stop):
            for slot, position in zip(slots, segment.positions.tolist(), strict=True):
                assert rows[row][slot] is PAD
                rows[row][slot] = position
    return rows


def globals_of(segments) -> list[tuple[int, ...]]:
    owner = {row: s.chosen for s in segments.entries for row in range(s.rows.start, s.rows.stop)}
    return [owner[row] for row in range(segments.batch)]


class Lists:
    """Rows as lists of positions, the tokens that each has seen, its globals, and what there was before each slot."""

    def __init__(self, batch):
        self.rows, self.seen, self.chosen = [[] for _ in range(batch)], [0] * batch, [()] * batch
        self.before = []

    def extend(self, real, chosen):
        for column in range(real.shape[1]):
            self.before.append(([*self.seen], [*self.chosen]))
            for row, slots in enumerate(self.rows):
                slots.append(self.seen[row] if real[row, column] else PAD)
                if real[row, column]:
                    if chosen[row, column]:
                        self.chosen[row] += (self.seen[row],)
                    self.seen[row] += 1

    def keep(self, kept):
        """Gather slots as the buffers are gathered; slots of no sequence hold anything."""
        table = kept.expand(len(self.rows), -1).tolist() if kept.ndim == 1 else kept.tolist()
        self.rows = [[slots[slot] for slot in taken] for slots, taken in zip(self.rows, table, strict=True)]
        self.before = []

    def take_back(self, count):
        if count:
            self.rows = [slots[: len(slots) - count] for slots in self.rows]
            self.seen, self.chosen = self.before[-count]
            self.before = self.before[:-count]

    def take_rows(self, rows):
        pick = lambda of: [of[row] if not isinstance(of[row], list) else [*of[row]] for row in rows]  # noqa: E731
        self.rows, self.seen, self.chosen = pick(self.rows), pick(self.seen), pick(self.chosen)
        self.before = [(pick(seen), pick(chosen)) for seen, chosen in self.before]


def agree(segments, lists, gathered=False):
    """Assert the same positions in the same slots; after gathering, slots of no sequence may hold copies."""
    for told, known in zip(places(segments), lists.rows, strict=True):
        assert len(told) == len(known)
        for slot, (a, b) in enumerate(zip(told, known, strict=True)):
            if gathered and a is PAD:
                known[slot] = PAD
            else:
                assert a == b
    assert globals_of(segments) == lists.chosen


def all_needed_are_there(segments, retention):
    for segment in segments.entries:
        n, there = segment.end, set(segment.positions.tolist())
        own = retention(segment.chosen)
        tail = own.tail(n)
        needed = {*range(tail, n), *np.arange(tail)[own.keeps(np.arange(tail), n)].tolist()}
        assert needed <= there


def walk(data, pattern):
    """Do random things to both, and compare them after each."""
    batch = data.draw(st.integers(1, 3), label="rows")
    retention, held, lists = retention_of(pattern), Held.nothing(batch), Lists(batch)
    with_padding, with_globals = data.draw(st.booleans()), data.draw(st.booleans()) and pattern.takes_globals
    for _ in range(data.draw(st.integers(1, 12), label="calls")):
        kind = data.draw(st.sampled_from(["extend"] * 5 + ["back", "rows"]), label="kind")
        if kind == "extend":
            shape = (batch, data.draw(st.sampled_from([1, 1, 1, 2, 5, 11]), label="tokens"))
            flags = st.lists(st.booleans(), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])
            real, chosen = np.ones(shape, bool), np.zeros(shape, bool)
            if with_padding and data.draw(st.booleans()):
                real = np.array(data.draw(flags, label="real")).reshape(shape)
            if with_globals and data.draw(st.booleans()):
                chosen = np.array(data.draw(flags, label="chosen")).reshape(shape) & real
            record = data.draw(st.sampled_from([False, False, True]), label="record")
            room = held.room
            step = next_step(
                held,
                shape[1],
                retention,
                real=None if real.all() else real,
                chosen=chosen if chosen.any() else None,
                record=record,
            )
            lists.extend(real, chosen)
            assert step.before is held
            agree(step.call, lists)
            held = step.after
            if step.kept is not None:
                assert not record and step.call.k_len > room and held.undo == 0
                lists.keep(step.kept)
            agree(held.segments, lists, gathered=step.kept is not None)
            assert held.length <= held.room
        elif kind == "back":
            count = data.draw(st.integers(0, len(lists.rows[0])), label="count")
            if count > len(lists.before):
                with pytest.raises(ValueError, match=f"{count} tokens are to be taken back but"):
                    take_back(held, count)
            else:
                assert held.undo == len(lists.before)
                held = take_back(held, count)
                lists.take_back(count)
                agree(held.segments, lists)
        else:
            rows = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4), label="rows taken")
            held, batch = take_rows(held, rows), len(rows)
            lists.take_rows(rows)
            agree(held.segments, lists)
        all_needed_are_there(held.segments, retention)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_slots_hold_what_lists_hold(pattern, data):
    walk(data, pattern)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_slots_of_any_pattern_hold_what_lists_hold(data):
    walk(data, data.draw(st.sampled_from(static_patterns()).flatmap(named), label="pattern"))


def _run(pattern, lengths):
    retention, held, most = retention_of(pattern), Held.nothing(1), []
    for q_len in lengths:
        held = next_step(held, q_len, retention).after
        most.append(held.room)
    return held, most


def test_slots_never_exceed_what_is_seen_and_the_slack():
    held, rooms = _run(StreamingLLM(sinks=2, window=4), [1] * 200)
    assert max(rooms) == 2 + 3 + 3 and held.segments.entries[0].positions[:2].tolist() == [0, 1]
    assert held.segments.entries[0].columns.positions.tolist() == [0, 1]


def test_a_drop_keeps_exactly_what_later_tokens_see():
    retention = retention_of(StreamingLLM(sinks=2, window=4))
    step = next_step(Held.nothing(2), 20, retention)
    assert step.kept.tolist() == [0, 1, 17, 18, 19]  # the next query, 20, sees 17 to 20
    assert step.after.segments.is_whole and step.after.undo == 0


def test_rows_of_different_lengths_end_in_the_same_slot():
    real = np.ones((2, 20), bool)
    real[1, :17] = False
    step = next_step(Held.nothing(2), 20, retention_of(StreamingLLM(sinks=2, window=4)), real=real)
    assert places(step.after.segments) == [[0, 1, 17, 18, 19], [PAD, PAD, 0, 1, 2]]
    assert step.kept[0].tolist() == [0, 1, 17, 18, 19] and step.kept[1, 2:].tolist() == [17, 18, 19]


def test_rows_taken_twice_hold_the_same():
    real = np.ones((3, 6), bool)
    real[1, :2] = False
    held = next_step(Held.nothing(3), 6, retention_of(SlidingWindow(window=3)), real=real).after
    taken = take_rows(held, [1, 1, 0, 2])
    assert [s.rows for s in taken.segments.entries] == [slice(0, 2), slice(2, 3), slice(3, 4)]
    assert places(taken.segments) == [places(held.segments)[row] for row in (1, 1, 0, 2)]


def test_recording_drops_nothing_and_says_how_to_begin():
    retention = retention_of(SlidingWindow(window=3))
    held = next_step(Held.nothing(1), 12, retention, record=True).after
    held = next_step(held, 12, retention, record=True).after
    assert held.length == 24 and places(take_back(held, 20).segments) == [[0, 1, 2, 3]]
    dropped = next_step(held, 9, retention).after
    assert dropped.length < 24
    with pytest.raises(ValueError, match="activate_past_recording"):
        take_back(dropped, 1)


def test_kept_slots_are_indices_of_the_call():
    step = next_step(Held.nothing(1), 9, retention_of(Longformer(window=2, global_tokens=(0, 4))))
    assert step.kept.dtype == torch.int64 and step.kept.tolist() == [0, 4, 8]
