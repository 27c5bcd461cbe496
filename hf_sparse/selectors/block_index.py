"""Summaries of blocks, made once for each when it is whole, and the best of them for new queries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..patterns.parts import Bound
from .block_selector import BlockSelector
from .choose import QueryBlocks, candidates
from .list_index import ListIndex, joined_lists, part_of
from .room import appended

_SCORES = 2**24  # scores computed at a time


class BlockIndex(ListIndex[BlockSelector]):
    """Scores the summaries of whole blocks."""

    _tensors = ("_summaries", "_recent", "_lists_held")

    def __init__(self, selector: BlockSelector) -> None:
        super().__init__(selector)
        self._summaries: Tensor | None = None  # [R, H_kv, room, ...], the first `_count` filled
        self._count = 0

    def _lists(
        self, query: Tensor, key: Tensor, blocks: QueryBlocks, first: int, starts: tuple[Bound, ...]
    ) -> Tensor:
        selector, begin = self.selector, first + key.shape[2] - query.shape[2]
        self._summarise(query, key, first)
        seen = int(blocks.high.max(initial=0))
        if self._summaries is None or not seen:
            return query.new_full((query.shape[0], 1, len(blocks), 0), -1, dtype=torch.int64)
        if selector.looks_ahead and not begin:  # the last queries of the prompt choose for all
            asked = self._asking(query, blocks.asks[:1] + query.shape[2] - 1, begin, 1)
            asked = asked.expand(-1, -1, len(blocks), -1, -1)
        else:
            asked = self._asking(query, blocks.asks, begin, selector.queries)
        summaries = self._summaries[:, :, :seen]
        scored = query.shape[0] * query.shape[1] * seen * selector.scores_per_block
        step = max(1, _SCORES // max(1, scored))
        parts = []
        for start in range(0, len(blocks), step):
            part = part_of(blocks, start, min(start + step, len(blocks)))
            among = candidates(part, seen, query.device)
            scores = selector.score_among(asked[:, :, start : start + step], summaries, among)
            parts.append(selector.choose(scores, part))
        return joined_lists(parts)

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
            key = pad(key, (0, 0, gone, 0))
        new = key[:, :, before * size - (first - gone) : count * size - (first - gone)]
        new = new.to(query.dtype).unflatten(2, (-1, size))
        last = (before + 1) * size - 1 - (end - query.shape[2])
        selector: Any = self.selector
        if selector.looks_ahead and end > query.shape[2]:  # the blocks of a prompt alone look at each other
            selector = replace(selector, selection="causal")
        found = selector.summarise(new, query[:, :, last::size][:, :, : count - before])
        self._summaries = appended(self._summaries, before, found)
        self._count = count

    def _take_back(self, length: int) -> None:
        super()._take_back(length)
        self._count = min(self._count, length // self.selector.block)

    def _alike(self, name: str, parts: list[Tensor]) -> list[Tensor]:
        if name == "_summaries":
            return [x[:, :, : self._count] for x in parts]
        return super()._alike(name, parts)
