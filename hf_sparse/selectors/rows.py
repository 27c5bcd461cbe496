"""The indexes of a batch: one for each group of rows that go on alike, as beams and padding divide them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .base import Selector
from .index import Index


class RowIndexes:
    """Keeps what the earlier tokens of each row left behind."""

    def __init__(self, selector: Selector) -> None:
        self.selector = selector
        self._rows: list[tuple[Index[Any], int]] = []  # for each row its index, and its place there

    def of(self, groups: Sequence[slice]) -> list[Index[Any]]:
        """Return the index of each group of rows, which have the same tokens padded."""
        count = max((rows.stop for rows in groups), default=0)
        while len(self._rows) < count:
            self._rows.append((self.selector.index(), 0))
        found = []
        for rows in groups:
            index = self._joined(self._rows[rows])
            self._rows[rows] = [(index, place) for place in range(rows.stop - rows.start)]
            found.append(index)
        return found

    def check_taken_back(self, tokens: int) -> None:
        """Raise ValueError if some row cannot forget the last `tokens`."""
        for index in {id(index): index for index, _ in self._rows}.values():
            index.check_taken_back(max(0, index.length - tokens))

    def reorder(self, rows: Sequence[int]) -> None:
        """Let row i go on with what row ``rows[i]`` left behind."""
        self._rows = [self._rows[row] for row in rows]

    @property
    def nbytes(self) -> int:
        """Bytes of all indexes."""
        return sum(index.nbytes for index in {id(index): index for index, _ in self._rows}.values())

    def _joined(self, rows: Sequence[tuple[Index[Any], int]]) -> Index[Any]:
        first = rows[0][0]
        same = all(index is first for index, _ in rows)
        if same and [place for _, place in rows] == list(range(first.rows or len(rows))):
            # Another group may go on with the same rows, as beams do.
            shared = sum(index is first for index, _ in self._rows) > len(rows)
            return first.taken(None) if shared else first
        if same:
            return first.taken(torch.tensor([place for _, place in rows]))
        if not any(index.length for index, _ in rows):
            return self.selector.index()
        parts = [index.taken(torch.tensor([place])) for index, place in rows]
        return parts[0].joined(parts[1:])
