"""What tokens leave behind for those that come later: summaries of their blocks, and what is being read.

A cache keeps one for each sequence of a layer; a call without a cache makes one for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..patterns.parts import Bound
from .base import Selector
from .blocks import QueryBlocks, query_blocks
from .choose import candidates
from .selection import Selection

TAKEN_BACK = 64  # tokens that can be taken back, as assisted generation does
_SCORES = 2**24  # scores computed at a time


_TENSORS = ("_summaries", "_recent", "_lists_held")


class BlockIndex:
    """Selects for the new queries of a sequence, in as many calls as its tokens come in.

    Each block of keys is summarised once, when it is whole.

    length: tokens seen.
    """

    def __init__(self, selector: Selector) -> None:
        self.selector = selector
        self.length = 0
        self._summaries: Tensor | None = None  # [R, H_kv, room, ...], the first `_count` filled
        self._count = 0
        self._recent: Tensor | None = None  # [R, H, W - 1, D], the last queries
        # What the last blocks of queries read, [R, G, j, m], and the number of the first of them.
        self._lists_held: Tensor | None = None
        self._first_held = 0

    @torch.no_grad()
    def select(self, query: Tensor, key: Tensor, first: int = 0, starts: tuple[Bound, ...] = ()) -> Selection:
        """Return what new causal queries read.

        Args:
            query: [R, H, Q, D], the last Q of the keys, all of them new.
            key: [R, H_kv, K, D], the keys of the sequence from position `first` on; those before it are seen no more.
            starts: before which the model itself lets a query see nothing.
        Raises:
            ValueError: tokens came in between that this index has not seen.
        """
        end = first + key.shape[2]
        begin = end - query.shape[2]
        if begin < self.length:
            self._take_back(begin)
        if begin != self.length:
            raise ValueError(
                f"{self.selector} knows the first {self.length} tokens of a sequence and is asked to go on after "
                f"{begin}; use a cache made by hf_sparse.make_cache, or pass use_cache=False with the whole text"
            )
        exact = torch.promote_types(query.dtype, torch.float32)
        query = query.detach()
        self._summarise(query.to(exact), key.detach(), first)
        blocks = query_blocks(self.selector, begin, end, starts)
        lists = self._lists(query.to(exact), blocks, begin)
        opened = self._open(begin)
        if opened is not None:
            lists = _joined(opened, lists)
        self._remember(lists, blocks.first)
        self._recent = self._last(query.to(exact))
        self.length = end
        selector = self.selector
        counts = np.minimum(blocks.counts, lists.shape[3])
        if not selector.takes_all_counted and lists.device.type == "cpu":  # elsewhere counting would wait
            counts = (lists >= 0).sum(3).amax((0, 1)).numpy()
        lists = lists[..., : counts.max(initial=0)]  # what was held may be longer, behind the last of a list
        return Selection(
            selector.block, selector.queries, blocks.first, lists, counts, selector.takes_all_counted
        )

    @property
    def rows(self) -> int:
        """Rows that go on alike; 0 before the first token."""
        return 0 if self._lists_held is None else self._lists_held.shape[0]

    def taken(self, rows: Tensor | None) -> BlockIndex:
        """Return an index of its own for some rows, int64; None for all."""
        made = copy(self)
        for name in _TENSORS:
            if (x := getattr(self, name)) is not None:
                setattr(made, name, x.clone() if rows is None else x.index_select(0, rows.to(x.device)))
        return made

    @staticmethod
    def joined(indexes: Sequence[BlockIndex]) -> BlockIndex:
        """Return one index for the rows of several that have seen equally many tokens."""
        made = copy(indexes[0])
        for name in _TENSORS:
            parts = [x for index in indexes if (x := getattr(index, name)) is not None]
            if name == "_summaries":
                parts = [x[:, :, : made._count] for x in parts]
            if name == "_lists_held" and parts:
                parts = _alike(parts)
            setattr(made, name, torch.cat(parts) if parts else None)
        return made

    @property
    def nbytes(self) -> int:
        """Bytes held, the room for coming blocks included."""
        held = (self._summaries, self._recent, self._lists_held)
        return sum(x.untyped_storage().nbytes() for x in held if x is not None)

    def _summarise(self, query: Tensor, key: Tensor, first: int) -> None:
        """Add the blocks that are whole now, and were not before."""
        size, before = self.selector.block, self._count
        end = first + key.shape[2]
        count = end // size
        if count == before:
            return
        if gone := max(
            0, first - before * size
        ):  # of blocks that no query will see whole; any summary will do
            key = torch.nn.functional.pad(key, (0, 0, gone, 0))
        new = key[:, :, before * size - (first - gone) : count * size - (first - gone)]
        new = new.to(query.dtype).unflatten(2, (-1, size))
        last = (before + 1) * size - 1 - (end - query.shape[2])
        found = self.selector.summarise(new, query[:, :, last::size][:, :, : count - before])
        if self._summaries is None or count > self._summaries.shape[2]:
            room = found.new_empty((*found.shape[:2], _room(count, before), *found.shape[3:]))
            if self._summaries is not None:
                room[:, :, :before] = self._summaries[:, :, :before]
            self._summaries = room
        self._summaries[:, :, before:count] = found
        self._count = count

    def _lists(self, query: Tensor, blocks: QueryBlocks, begin: int) -> Tensor:
        """Return what the blocks read that begin with a new query, [R, G, J, m]."""
        held = 1 if begin % self.selector.queries else 0
        blocks = _part(blocks, held, len(blocks))
        asked = self._asking(query, blocks, begin)
        seen = int(blocks.high.max(initial=0))
        if self._summaries is None or not seen:
            return query.new_full((query.shape[0], 1, len(blocks), 0), -1, dtype=torch.int64)
        summaries = self._summaries[:, :, :seen]
        scored = query.shape[0] * query.shape[1] * seen * self.selector.scores_per_block
        step = max(1, _SCORES // max(1, scored))
        parts = []
        for start in range(0, len(blocks), step):
            part = _part(blocks, start, min(start + step, len(blocks)))
            among = candidates(part, seen, query.device)
            scores = self.selector.score_among(asked[:, :, start : start + step], summaries, among)
            parts.append(self.selector.choose(scores, part))
        most = max(part.shape[3] for part in parts)
        return torch.cat([_wide(part, most) for part in parts], 2)

    def _asking(self, query: Tensor, blocks: QueryBlocks, begin: int) -> Tensor:
        """Return the latest queries when each block begins, [R, H, J, W, D]."""
        width = self.selector.looks_back
        if not len(blocks):
            return query[:, :, :0, None].expand(-1, -1, -1, width, -1)
        first, size = int(blocks.asks[0]) - begin, self.selector.queries
        if width == 1:
            return query[:, :, first::size, None]
        return torch.cat((self._before(query), query), 2)[:, :, first:].unfold(2, width, size).transpose(3, 4)

    def _last(self, query: Tensor) -> Tensor | None:
        if self.selector.looks_back == 1:
            return None
        whole = query if self._recent is None else torch.cat((self._recent, query), 2)
        return whole[:, :, -(self.selector.looks_back - 1 + TAKEN_BACK) :].clone()

    def _before(self, query: Tensor) -> Tensor:
        """Return the queries before the new ones that the first of these looks back to, 0 where there are none."""
        width = self.selector.looks_back - 1
        recent = query[:, :, :0] if self._recent is None else self._recent[:, :, -width:]
        return torch.nn.functional.pad(recent, (0, 0, width - recent.shape[2], 0))

    def _open(self, begin: int) -> Tensor | None:
        """Return what the block reads that the token before `begin` did not finish, [R, G, 1, m]."""
        if not begin % self.selector.queries:
            return None
        assert self._lists_held is not None
        place = begin // self.selector.queries - self._first_held
        return self._lists_held[:, :, place : place + 1]

    def _remember(self, lists: Tensor, first: int) -> None:
        """Keep what the last blocks of queries read, of as many tokens as may be taken back."""
        if self._lists_held is not None:
            before = self._lists_held[:, :, : first - self._first_held]
            lists, first = _joined(before, lists), self._first_held
        most = -(-TAKEN_BACK // self.selector.queries) + 1
        self._first_held = first + max(0, lists.shape[2] - most)
        self._lists_held = lists[:, :, -most:].clone()

    def _take_back(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        gone = self.length - length
        if gone > TAKEN_BACK and length:
            raise ValueError(
                f"{gone} tokens are to be taken back and {self.selector} remembers what it selected for the last "
                f"{TAKEN_BACK}; take back fewer, or read the text again with a new cache"
            )
        self.length, self._count = length, min(self._count, length // self.selector.block)
        if self._recent is not None:
            self._recent = self._recent[:, :, : max(0, self._recent.shape[2] - gone)]
        if self._lists_held is not None:
            kept = -(-length // self.selector.queries) - self._first_held
            self._lists_held = self._lists_held[:, :, : max(0, kept)]


def _alike(parts: list[Tensor]) -> list[Tensor]:
    """Return lists padded to one width."""
    most, groups = max(x.shape[3] for x in parts), max(x.shape[1] for x in parts)
    return [_wide(x, most).expand(-1, groups, -1, -1) for x in parts]


def _room(count: int, before: int) -> int:
    """Return for how many blocks to make room: as many as there are, and half again where more have come before."""
    return count if not before else count + count // 2


def _part(blocks: QueryBlocks, start: int, stop: int) -> QueryBlocks:
    own = slice(start, stop)
    return replace(
        blocks,
        first=blocks.first + start,
        asks=blocks.asks[own],
        low=blocks.low[own],
        high=blocks.high[own],
        counts=blocks.counts[own],
    )


def _joined(before: Tensor, after: Tensor) -> Tensor:
    groups, most = max(before.shape[1], after.shape[1]), max(before.shape[3], after.shape[3])
    wide = [_wide(x, most).expand(-1, groups, -1, -1) for x in (before, after)]
    return torch.cat(wide, 2)


def _wide(lists: Tensor, most: int) -> Tensor:
    return torch.nn.functional.pad(lists, (0, most - lists.shape[3]), value=-1)
