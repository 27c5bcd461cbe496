"""What a schedule is made of: runs of chunks of query rows, and the key spans that every chunk reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys of a span each row may attend to.

    lo, hi: int64 [rows], or [repeat, rows] where the chunks of a run differ: a row sees keys lo:hi of the span.
    """

    lo: np.ndarray
    hi: np.ndarray

    @property
    def differs(self) -> bool:
        return self.lo.ndim == 2

    def allowed(self, width: int, device: torch.device, chunks: slice = slice(None)) -> Tensor:
        """Return [rows, width] bool, or [chunks, rows, width] where they differ, True = may attend."""
        key = torch.arange(width, device=device)
        lo, hi = (x[chunks] if self.differs else x for x in (self.lo, self.hi))
        low, high = (torch.from_numpy(np.ascontiguousarray(x)).to(device)[..., None] for x in (lo, hi))
        return (key >= low) & (key < high)


@dataclass(frozen=True, eq=False)
class Span:
    """Keys that every row of a chunk reads: numbers first .. first + width of the piece's key list.

    step: how many keys further the same span of the run's next chunk begins.
    mask: None when every row sees all of them.
    causal: row t sees the first t + 1 of them (then width = rows, and mask is None).
    """

    piece: int
    first: int
    width: int
    step: int = 0
    mask: Mask | None = None
    causal: bool = False

    def keys(self, number: int) -> slice:
        """Return the span's keys in the run's chunk `number`."""
        first = self.first + number * self.step
        return slice(first, first + self.width)


@dataclass(frozen=True, eq=False)
class Run:
    """`repeat` chunks of `rows` queries, each beginning `step` rows after the one before.

    empty: [repeat, rows] bool, rows that see no key at all; None when there are none.
    """

    row: int
    rows: int
    spans: tuple[Span, ...]
    repeat: int = 1
    step: int = 0
    empty: np.ndarray | None = None

    def chunks(self) -> Iterator[tuple[int, slice]]:
        """Yield the number and the rows of each chunk."""
        for number in range(self.repeat):
            first = self.row + number * self.step
            yield number, slice(first, first + self.rows)
