"""Estimates of where all queries look, made of a few that look at every key."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..patterns.parts import Bound
from .choose import QueryBlocks, candidates
from .list_index import TAKEN_BACK, ListIndex, joined_lists, part_of
from .vertical_slash import VerticalSlash

_PAIRS = 2**24  # pairs of blocks compared at a time


class EstimateIndex(ListIndex[VerticalSlash]):
    """Keeps the latest estimates: the weight of each column and of each diagonal of blocks."""

    _tensors = ("_recent", "_lists_held", "_estimates")

    def __init__(self, selector: VerticalSlash) -> None:
        super().__init__(selector)
        # [R, H_kv, e, 2, n]: columns by their number, diagonals by their distance; -1 for those not seen.
        self._estimates: Tensor | None = None
        self._since: tuple[int, ...] = ()  # the first position that each serves

    def _lists(
        self, query: Tensor, key: Tensor, blocks: QueryBlocks, first: int, starts: tuple[Bound, ...]
    ) -> Tensor:
        end = first + key.shape[2]
        begin = end - query.shape[2]
        if self.selector.looks_ahead and not begin:
            self._add(self._estimate(query, key, end - 1, first, starts), 0)
        else:
            for at in self.selector.estimated_at(begin, end):
                self._add(self._estimate(query, key, at, first, starts), at)
        parts = [query.new_full((query.shape[0], 1, 0, 0), -1, dtype=torch.int64)]
        bounds = np.searchsorted(blocks.asks, self._since).tolist()
        for number, (start, stop) in enumerate(zip(bounds, [*bounds[1:], len(blocks)], strict=True)):
            parts += self._read(part_of(blocks, start, stop), number) if start < stop else []
        kept = TAKEN_BACK // self.selector.block + 2
        assert self._estimates is not None
        self._estimates, self._since = self._estimates[:, :, -kept:].clone(), self._since[-kept:]
        return joined_lists(parts)

    def _estimate(self, query: Tensor, key: Tensor, at: int, first: int, starts: tuple[Bound, ...]) -> Tensor:
        """Return the weight of each column and diagonal by the last queries up to position `at`, [R, H_kv, 2, n].

        They look at the keys that the last of them may see, so that a cache may have dropped the others.
        """
        selector, begin = self.selector, first + key.shape[2] - query.shape[2]
        asked = self._asking(query, np.array([at]), begin, 1)[:, :, 0]
        asked = asked[:, :, -min(selector.looks_back, at + 1) :] * query.shape[3] ** -0.5
        size, count = selector.block, at // selector.block + 1
        position = torch.arange(at + 1 - asked.shape[2], at + 1, device=key.device)
        low = max([first, *(int(start.at(np.array([at]))[0]) for start in starts)])
        unseen = torch.arange(low, at + 1, device=key.device) > position[:, None]
        distance = (position // size)[:, None] - torch.arange(count, device=key.device)
        around = (low, count * size - at - 1)
        blind = position < low
        found = []
        for head, own in enumerate(asked.unflatten(1, (key.shape[1], -1)).unbind(1)):
            scores = own @ key[:, head, None, low - first : at + 1 - first].to(own.dtype).mT
            scores.masked_fill_(unseen, float("-inf")).masked_fill_(blind[:, None], 0.0)
            weights = scores.softmax(-1).mean(1).masked_fill_(blind[:, None], 0.0)  # [R, W, K]
            mass = pad(weights, around).unflatten(2, (count, size)).sum(3)  # [R, W, n]
            diagonals = mass.new_zeros((len(mass), count))
            diagonals.index_add_(1, distance.clamp(min=0).flatten(), mass.flatten(1))
            found.append(torch.stack((mass.sum(1), diagonals), 1))
        return torch.stack(found, 1)

    def _add(self, estimate: Tensor, since: int) -> None:
        made = estimate[:, :, None]
        if self._estimates is not None:
            before = pad(self._estimates, (0, made.shape[4] - self._estimates.shape[4]), value=-1.0)
            made = torch.cat((before, made), 2)
        self._estimates, self._since = made, (*self._since, since)

    def _read(self, blocks: QueryBlocks, number: int) -> list[Tensor]:
        """Return what blocks of queries read by one estimate, each [R, H_kv, j, m]."""
        assert self._estimates is not None
        columns, diagonals = self._estimates[:, :, number].unbind(2)  # [R, H_kv, n]
        step = max(1, _PAIRS // columns.numel())
        parts = []
        for start in range(0, len(blocks), step):
            part = part_of(blocks, start, min(start + step, len(blocks)))
            own = torch.from_numpy(part.asks // self.selector.block).to(columns.device)[:, None]
            n = max(int(part.asks.max()) // self.selector.block + 1, columns.shape[2])
            among = candidates(part, n, columns.device)
            by_distance = own - torch.arange(n, device=columns.device)
            is_near = (by_distance >= 0) & among.gather(1, by_distance.clamp(min=0))
            seen = (part.asks // self.selector.block + 1).tolist()
            vertical = _best(columns, among, [self.selector.columns(s) for s in seen])
            slash = _best(diagonals, is_near, [self.selector.diagonals(s) for s in seen])
            read = torch.zeros(
                (*columns.shape[:2], len(part), n + 1), dtype=torch.bool, device=columns.device
            )
            read.scatter_(3, torch.where(vertical < 0, n, vertical), True)
            read.scatter_(3, torch.where(slash < 0, n, own - slash), True)
            order = read[..., :n].to(torch.uint8).sort(dim=-1, descending=True, stable=True)
            lists = order.indices.masked_fill_(order.values == 0, -1)
            parts.append(lists[..., : max(1, int(part.counts.max(initial=0)))])
        return parts

    def _take_back(self, length: int) -> None:
        super()._take_back(length)
        kept = sum(since < length for since in self._since)
        self._since = self._since[:kept]
        if self._estimates is not None:
            self._estimates = self._estimates[:, :, :kept] if kept else None


def _best(weights: Tensor, among: Tensor, counts: list[int]) -> Tensor:
    """Return the numbers of the greatest weights [R, H_kv, n] for each row of `among`, bool [J, N], -1 behind them.

    int64 [R, H_kv, J, m]; of equal ones the lower number comes first.
    """
    own = pad(weights, (0, among.shape[1] - weights.shape[2]), value=-1.0)
    scores = own[:, :, None].masked_fill(~among, -1.0)
    found = scores.sort(dim=-1, descending=True, stable=True)
    most = torch.tensor(counts).to(weights.device, non_blocking=True)[:, None]
    is_taken = (found.values >= 0) & (torch.arange(scores.shape[3], device=weights.device) < most)
    return found.indices.masked_fill(~is_taken, -1)[..., : max(counts, default=0)]
