"""Indexes whose selections are lists of blocks, one for each block of queries."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..patterns.parts import Bound
from .blocks import ListSelector, query_blocks
from .choose import QueryBlocks
from .index import Index
from .selection import Selection

TAKEN_BACK = 64  # tokens that can be taken back, as assisted generation does

S = TypeVar("S", bound=ListSelector)


class ListIndex(Index[S]):
    """Keeps the latest queries, and what the unfinished block of queries reads."""

    _tensors: ClassVar[tuple[str, ...]] = ("_recent", "_lists_held")

    def __init__(self, selector: S) -> None:
        super().__init__(selector)
        self._recent: Tensor | None = None  # [R, H, W - 1, D], the last queries
        # What the last blocks of queries read, [R, G, j, m], and the number of the first of them.
        self._lists_held: Tensor | None = None
        self._first_held = 0
        self._counts_held = np.empty(0, dtype=np.int64)  # their lengths: the budget may have been another
        self._going_on: Selection | None = None  # of the unfinished block alone, while single tokens come

    @property
    def rows(self) -> int:
        return 0 if self._lists_held is None else self._lists_held.shape[0]

    @abstractmethod
    def _lists(
        self, query: Tensor, key: Tensor, blocks: QueryBlocks, first: int, starts: tuple[Bound, ...]
    ) -> Tensor:
        """Return what blocks of queries read, [R, G, J, m], -1 behind the last one of a list.

        Args:
            query: [R, H, Q, D], the new ones, among them the first of each block.
            key: [R, H_kv, K, D], of all positions from `first` on, the last Q those of the queries.
            starts: before which the model itself lets a query see nothing.
        """

    def _select(self, query: Tensor, key: Tensor, first: int, starts: tuple[Bound, ...]) -> Selection:
        selector, end = self.selector, first + key.shape[2]
        begin = end - query.shape[2]
        blocks = query_blocks(selector, begin, end, starts)
        opened = 1 if begin % selector.queries else 0
        lists = self._lists(query, key, part_of(blocks, opened, len(blocks)), first, starts)
        counts, alone = blocks.counts, query.shape[2] == 1
        if opened and alone and self._going_on is not None:
            self._recent = self._last(query)
            return self._going_on
        if opened:
            place = begin // selector.queries - self._first_held
            lists = joined_lists([self._open(place), lists])
            counts = np.concatenate((self._counts_held[place : place + 1], counts[1:]))
        self._remember(lists, counts, blocks.first)
        self._recent = self._last(query)
        counts = np.minimum(counts, lists.shape[3])
        if not selector.takes_all_counted and lists.device.type == "cpu":  # elsewhere counting would wait
            counts = (lists >= 0).sum(3).amax((0, 1)).numpy()
        lists = lists[..., : counts.max(initial=0)]  # what was held may be longer, behind the last of a list
        found = Selection(
            selector.block, selector.queries, blocks.first, lists, counts, selector.takes_all_counted
        )
        self._going_on = found if alone else None
        return found

    def taken(self, rows: Tensor | None) -> Self:
        made = super().taken(rows)
        made._going_on = self._going_on if rows is None else None
        return made

    def joined(self, others: Sequence[Self]) -> Self:
        made = super().joined(others)
        made._going_on = None
        return made

    def _asking(self, query: Tensor, asks: np.ndarray, begin: int, spacing: int) -> Tensor:
        """Return the latest queries at evenly spaced new positions, [R, H, J, W, D], 0 where there are fewer.

        query: [R, H, Q, D], those at positions from `begin` on.
        """
        width = self.selector.looks_back
        if not len(asks):
            return query[:, :, :0, None].expand(-1, -1, -1, width, -1)
        at = int(asks[0]) - begin
        if width == 1:
            return query[:, :, at::spacing, None]
        recent = query[:, :, :0] if self._recent is None else self._recent[:, :, 1 - width :]
        before = pad(recent, (0, 0, width - 1 - recent.shape[2], 0))
        return torch.cat((before, query), 2)[:, :, at:].unfold(2, width, spacing).transpose(3, 4)

    def _last(self, query: Tensor) -> Tensor | None:
        if self.selector.looks_back == 1:
            return None
        most = self.selector.looks_back - 1 + TAKEN_BACK
        new = query[:, :, -most:]
        if self._recent is None or new.shape[2] == most:
            return new.clone()
        return torch.cat((self._recent[:, :, new.shape[2] - most :], new), 2)

    def _open(self, place: int) -> Tensor:
        """Return what one of the blocks that are held reads, [R, G, 1, m]."""
        assert self._lists_held is not None
        return self._lists_held[:, :, place : place + 1]

    def _remember(self, lists: Tensor, counts: np.ndarray, first: int) -> None:
        """Keep what the last blocks of queries read, of as many tokens as may be taken back."""
        if self._lists_held is not None:
            before = self._lists_held[:, :, : first - self._first_held]
            counts = np.concatenate((self._counts_held[: before.shape[2]], counts))
            lists, first = joined_lists([before, lists]), self._first_held
        most = -(-TAKEN_BACK // self.selector.queries) + 1
        self._first_held = first + max(0, lists.shape[2] - most)
        self._lists_held, self._counts_held = lists[:, :, -most:].clone(), counts[-most:]

    def check_taken_back(self, length: int) -> None:
        gone = self.length - length
        if gone > TAKEN_BACK and length:
            raise ValueError(
                f"{gone} tokens are to be taken back and {self.selector} remembers what it selected for the last "
                f"{TAKEN_BACK}; take back fewer, or read the text again with a new cache"
            )

    def _take_back(self, length: int) -> None:
        self._going_on = None
        if self._recent is not None:
            kept = self._recent.shape[2] - (self.length - length)
            self._recent = self._recent[:, :, : max(0, kept)]
        if self._lists_held is not None:
            kept = -(-length // self.selector.queries) - self._first_held
            self._lists_held = self._lists_held[:, :, : max(0, kept)]

    def _alike(self, name: str, parts: list[Tensor]) -> list[Tensor]:
        if name != "_lists_held" or not parts:
            return super()._alike(name, parts)
        most, groups = max(x.shape[3] for x in parts), max(x.shape[1] for x in parts)
        return [widened(x, most).expand(-1, groups, -1, -1) for x in parts]


def part_of(blocks: QueryBlocks, start: int, stop: int) -> QueryBlocks:
    """Return some of the blocks of queries, start .. stop."""
    own = slice(start, stop)
    return replace(
        blocks,
        first=blocks.first + start,
        asks=blocks.asks[own],
        low=blocks.low[own],
        high=blocks.high[own],
        counts=blocks.counts[own],
    )


def widened(lists: Tensor, most: int) -> Tensor:
    """Return lists [..., m] of up to `most` entries."""
    return pad(lists, (0, most - lists.shape[-1]), value=-1)


def joined_lists(parts: list[Tensor]) -> Tensor:
    """Return lists [R, G or 1, j, m] of blocks of queries that follow each other as one tensor."""
    groups, most = max(x.shape[1] for x in parts), max(x.shape[3] for x in parts)
    return torch.cat([widened(x, most).expand(-1, groups, -1, -1) for x in parts], 2)
