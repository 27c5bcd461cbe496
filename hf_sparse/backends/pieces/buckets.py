"""Keys in the buckets of queries: queries that fell into the same chunk are computed together, wherever they stand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...selectors import BucketSelection
from ..selected import ALONE, Selected
from .lists import Tensors
from .masks import as_bias
from .merge import emit
from .tiled import Tiled, TileSpan


@dataclass(frozen=True)
class ScatteredTile:
    """T tiles of up to C rows of one head, which are gathered, computed by `Tiled`, and put back.

    row, head: of the tensors [B, H, Q, ...].
    query: int64 [T, C], indices of queries, no real one twice; 0 where there is none.
    real: int64 [n], which of the T * C are queries.
    empty: bool [T, C], rows that see no key.
    """

    row: int
    head: int
    query: Tensor
    real: Tensor
    span: TileSpan
    empty: Tensor | None

    def forward(
        self, tiled: Tiled, query: Tensor, out: Tensor, lse: Tensor, want_lse: bool, merge: bool
    ) -> None:
        """Merge the tile of `query` [B, H, Q, D] with what is in `out` and `lse`."""
        o, part = tiled.forward(self._rows(query), [self.span], self.empty, True)
        assert merge and part is not None
        at = self.query.flatten()[self.real]
        before, share = (x[self.row, self.head].index_select(0, at) for x in (out, lse))
        emit(before, share, o.flatten(0, 1)[self.real], part.flatten()[self.real], True)
        out[self.row, self.head].index_copy_(0, at, before)
        lse[self.row, self.head].index_copy_(0, at, share)

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
        """Add the tile's dq, and give its dk and dv."""
        assert not (alone or writes)
        o, part = self._rows(out), lse[self.row, self.head][self.query]
        dq = tiled.backward(self._rows(grad), self._rows(query), [self.span], o, part, self.empty)
        at = self.query.flatten()[self.real]
        dquery[self.row, self.head].index_add_(0, at, dq.flatten(0, 1)[self.real].to(dquery.dtype))

    def _rows(self, x: Tensor) -> Tensor:
        """Return the tile's rows [T, C, D] in the dtype of the computation."""
        rows = x[self.row, self.head].index_select(0, self.query.flatten()).view(*self.query.shape, -1)
        return rows.to(torch.promote_types(rows.dtype, torch.float32))


def run_buckets(chosen: Selected, own: BucketSelection, tensors: Tensors) -> Iterator[ScatteredTile]:
    """Yield the tiles of what hashing selected for one sequence, always in the same order.

    tensors: of all heads; the queries are the last of the keys.
    """
    heads, groups = tensors.query.shape[1], tensors.query.shape[1] // tensors.key.shape[1]
    exact = torch.promote_types(tensors.query.dtype, torch.float32)
    for row in range(tensors.key.shape[0]):
        for head in range(heads):
            kv = head // groups
            for tiles in own.tiles(row, head, kv):
                pairs = chosen.pairs_of(tiles, head)
                bias = as_bias(pairs, tensors.query.dtype)
                if own.is_counted:
                    alone = tiles.query[:, :, None] + chosen.begin == tiles.key[:, None]
                    bias += ALONE * alone
                nothing = ~pairs.any(-1)
                at = (tiles.key - chosen.first).clamp(min=0)
                flat = at.flatten()
                key, value = (
                    x[row, kv].index_select(0, flat).to(exact).view(*at.shape, -1)
                    for x in (tensors.key, tensors.value)
                )
                give = None
                if tensors.dkey is not None and tensors.dvalue is not None:
                    give = partial(_add, tensors.dkey[row, kv], tensors.dvalue[row, kv], flat)
                span = TileSpan(key, value, bias, give=give)
                real = (tiles.query >= 0).flatten().nonzero().flatten()
                yield ScatteredTile(row, head, tiles.query.clamp(min=0), real, span, nothing)


def _add(dkey: Tensor, dvalue: Tensor, at: Tensor, key: Tensor, value: Tensor) -> None:
    dkey.index_add_(0, at, key.flatten(0, 1))
    dvalue.index_add_(0, at, value.flatten(0, 1))
