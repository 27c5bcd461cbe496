"""A tile: rows of queries that are computed together, and where they stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .merge import emit, put
from .tiled import Tiled, TileSpan


@dataclass(frozen=True)
class Tile:
    """T tiles of M = G * C rows each, which one call of `Tiled` computes.

    place: views the tile's part of a tensor [B, H, Q, ...] as [T, G, C, ...].
    empty: [M] or [T, M] bool, rows that see no key.
    """

    place: Callable[[Tensor], Tensor]
    spans: list[TileSpan]
    empty: Tensor | None

    def forward(
        self, tiled: Tiled, query: Tensor, out: Tensor, lse: Tensor, want_lse: bool, merge: bool
    ) -> None:
        """Compute the tile of `query` [B, H, Q, D] into `out` and `lse`, or merge it with what is there."""
        o, share = tiled.forward(self._rows(query), self.spans, self.empty, want_lse or merge)
        place = self.place(out)
        part = None if share is None else share.view(place.shape[:-1])
        emit(place, self.place(lse), o.view(place.shape), part, merge)

    def backward(
        self,
        tiled: Tiled,
        grad: Tensor,
        query: Tensor,
        out: Tensor,
        lse: Tensor,
        dquery: Tensor,
        alone: bool,
        writes: bool,
    ) -> None:
        """Write or add the tile's dq, and give its dk and dv.

        alone: the rows see nothing but this tile's spans, so that `out` and `lse` are not needed.
        """
        o, share = None, None
        if not alone:
            o, share = self._rows(out), self.place(lse).flatten(1)
        dq = tiled.backward(self._rows(grad), self._rows(query), self.spans, o, share, self.empty)
        place = self.place(dquery)
        put(place, dq.view(place.shape), writes)

    def _rows(self, x: Tensor) -> Tensor:
        """Return the tile's rows [T, M, D], a view where the layout allows it, in the dtype of the computation."""
        rows = self.place(x).flatten(1, 2)
        return rows.to(torch.promote_types(rows.dtype, torch.float32))
