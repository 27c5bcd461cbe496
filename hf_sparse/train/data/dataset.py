"""The rows a model is trained on, held as one array of tokens, and the batches they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...documents import Skipped
from .masking import IGNORED, Masking

Row = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Samples(Dataset[Row]):
    """Rows of one or several pieces each.

    ids: int32, the tokens of all pieces of all rows, special ones included.
    piece_starts: int64 [pieces + 1], where each piece begins in `ids`, and the end.
    row_starts: int64 [rows + 1], the number of the first piece of each row, and of all pieces.
    short: see `make_samples`.
    filler: the token that shorter rows of a batch end in; it is never seen nor predicted.
    position_start: the first position of every piece.
    masking: of an encoder; None of a causal model, which predicts every token but the first of each piece.
    skipped: documents that were left out.
    unused: tokens of the texts that stand in no row; 0 unless `short` is "drop".
    """

    ids: np.ndarray
    piece_starts: np.ndarray
    row_starts: np.ndarray
    short: str
    filler: int
    position_start: int
    masking: Masking | None
    skipped: tuple[Skipped, ...]
    unused: int

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    @property
    def tokens(self) -> int:
        """Tokens of all rows, special ones included, what fills shorter rows not."""
        return len(self.ids)

    @property
    def longest(self) -> int:
        """Tokens of the longest piece: no token sees more."""
        return int(np.diff(self.piece_starts).max())

    @property
    def largest(self) -> int:
        """The largest token a model may be fed."""
        own = max(int(self.ids.max()), self.filler)
        return own if self.masking is None else max(own, self.masking.largest)

    def set_epoch(self, epoch: int) -> None:
        """Draw the masked words of this epoch from now on, where they are renewed."""
        if self.masking is not None and self.masking.wanted.renewed:
            self.masking.epoch.fill_(epoch)

    def __getitem__(self, row: int) -> Row:
        """Return ``input_ids`` [N] and ``labels`` [N] and, of packed rows, ``position_ids`` [N], all int64."""
        row = range(len(self))[row]
        starts = self.piece_starts[self.row_starts[row] : self.row_starts[row + 1] + 1]
        ids = self.ids[starts[0] : starts[-1]].astype(np.int64)
        if self.masking is None:
            labels = ids.copy()
            # A piece's first token is not to be predicted by the last one of the piece before.
            labels[starts[:-1] - starts[0]] = IGNORED
        else:
            ids, labels = self.masking.mask(ids, row)
        found = {"input_ids": ids, "labels": labels}
        if self.short == "pack":
            places = [np.arange(size) for size in np.diff(starts)]
            found["position_ids"] = np.concatenate(places) + self.position_start
        return found

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return the rows [B, N] as int64, N being the longest row's tokens.

        Packed rows are filled up by one more piece, whose tokens nothing sees or predicts: wherever there is an
        ``attention_mask``, models do not look for pieces. Padded rows come with one, where one of them is shorter.
        """
        width = max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": _filled([row["input_ids"] for row in rows], np.full(width, self.filler)),
            "labels": _filled([row["labels"] for row in rows], np.full(width, IGNORED)),
        }
        if self.short == "pack":
            restarted = np.arange(width) + self.position_start
            batch["position_ids"] = _filled([row["position_ids"] for row in rows], restarted)
        elif any(len(row["input_ids"]) < width for row in rows):
            real = [np.ones(len(row["input_ids"]), np.int64) for row in rows]
            batch["attention_mask"] = _filled(real, np.zeros(width, np.int64))
        return batch


def _filled(columns: Sequence[np.ndarray], filling: np.ndarray) -> Tensor:
    """Stack [n] columns to [B, N], each followed by the beginning of `filling` [N]."""
    rows = [np.concatenate((column, filling[: len(filling) - len(column)])) for column in columns]
    return torch.from_numpy(np.stack(rows))
