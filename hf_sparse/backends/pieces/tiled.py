"""Masked softmax over one cache-sized tile of scores: the operator for spans with a mask, dropout or soft-capping.

On a CPU two batched matrix products and a softmax on a tile that stays in the second-level cache are faster than the
fused operator with a mask, which works on 32 rows at a time and reads the mask as well (benchmarks/README.md).
Everything is computed in float32 at least.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class TileSpan:
    """Keys read by every row of a tile.

    key: [H_kv, S, D]; value: [H_kv, S, Dv].
    bias: [M, S] or [H_kv, M, S], 0 = may attend, -inf = not; None when every row sees all.
    index: [S] int64, where the keys stand in the list that gradients are added to; None when they follow each other.
    """

    key: Tensor
    value: Tensor
    bias: Tensor | None
    index: Tensor | None = None
    dkey: Tensor | None = None
    dvalue: Tensor | None = None

    def add(self, dkey: Tensor, dvalue: Tensor) -> None:
        assert self.dkey is not None and self.dvalue is not None
        if self.index is None:
            self.dkey += dkey
            self.dvalue += dvalue
        else:
            self.dkey.index_add_(1, self.index, dkey.to(self.dkey.dtype))
            self.dvalue.index_add_(1, self.index, dvalue.to(self.dvalue.dtype))


@dataclass
class Tiled:
    """One call's fixed numbers, and buffers reused from tile to tile.

    scale, softcap, dropout: as in `Call`.
    seed: of the dropout masks; tile number i draws from a generator seeded with seed + i, so that the backward pass
        draws the same.
    """

    scale: float
    softcap: float | None = None
    dropout: float = 0.0
    seed: int = 0
    tiles: int = 0
    _buffers: dict[tuple[str, tuple[int, ...]], Tensor] = field(default_factory=dict)

    def forward(
        self, query: Tensor, spans: list[TileSpan], empty: Tensor | None, want_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output [H, C, Dv], good until the next call, and, if wanted, the log-sum-exp [H, C] of a tile.

        Args:
            query: [H, C, D]; H is a multiple of the spans' H_kv, C * H / H_kv = M rows per key head.
            empty: [M] or [H_kv, M] bool, rows that see no key (their bias is 0): output 0, log-sum-exp -inf.
        """
        heads, rows, _ = query.shape
        out, lse = self.forward_rows(self._rows(query, spans[0].key), spans, empty, want_lse)
        return out.view(heads, rows, -1), None if lse is None else lse.reshape(heads, rows)

    def forward_rows(
        self, rows_q: Tensor, spans: list[TileSpan], empty: Tensor | None, want_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the same as [T, M, Dv] and [T, M] for T tiles at once; the output is overwritten by the next call.

        Args:
            rows_q: [T, M, D] in the dtype of the computation; the spans' keys and values then are [T, S, D or Dv].
        """
        weights, lse, _ = self._weights(rows_q, spans, None, want_lse)
        self._drop(weights)
        out = self._buffer("out", rows_q, (*rows_q.shape[:2], spans[0].value.shape[-1]))
        for number, (weight, span) in enumerate(zip(weights, spans, strict=True)):
            torch.baddbmm(out, weight, span.value.to(weight.dtype), beta=min(number, 1), out=out)
        if empty is not None:
            out = out.masked_fill(empty[..., None], 0.0)
            lse = lse.masked_fill(empty, float("-inf")) if lse is not None else None
        return out, lse

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        spans: list[TileSpan],
        out: Tensor,
        lse: Tensor | None,
        empty: Tensor | None,
    ) -> Tensor:
        """Return dq [H, C, D] of a tile, and add to the spans' dkey and dvalue.

        Args:
            grad, out: [H, C, Dv]; `out` and `lse` [H, C] are those of everything the rows see. `lse` is None when the
                rows see this one span only; the softmax is then taken anew.
        """
        first = spans[0].key
        rows_q, rows_g = self._rows(query, first), self._rows(grad, first)
        rows_lse = None if lse is None else lse.reshape(first.shape[0], -1)
        if rows_lse is not None and empty is not None:
            rows_lse = rows_lse.masked_fill(empty, 0.0)  # exp(score - -inf) would be infinite
        weights, _, slopes = self._weights(rows_q, spans, rows_lse, False)
        if empty is not None:
            for weight in weights:
                weight.masked_fill_(empty[..., None], 0.0)
        kept = self._drop_masks(weights)
        if rows_lse is not None:
            delta = (rows_g * self._rows(out, first)).sum(-1, keepdim=True)
        dq = None
        for number, (weight, span) in enumerate(zip(weights, spans, strict=True)):
            key, value = span.key.to(weight.dtype), span.value.to(weight.dtype)
            used = weight if kept is None else weight * kept[number]
            dvalue = torch.bmm(used.mT, rows_g)
            dweight = torch.bmm(rows_g, value.mT, out=self._buffer(f"dweight{number}", weight))
            if kept is not None:
                dweight.mul_(kept[number])
            if rows_lse is None:
                dscore = torch.ops.aten._softmax_backward_data(dweight, weight, -1, weight.dtype)
            else:
                dscore = dweight.sub_(delta).mul_(weight)
            if slopes is not None:
                dscore.mul_(slopes[number])
            share = torch.baddbmm(
                dq if dq is not None else rows_q, dscore, key, beta=float(dq is not None), alpha=self.scale
            )
            dq = share
            dkey = torch.bmm(dscore.mT, rows_q).mul_(self.scale)
            span.add(dkey, dvalue)
        assert dq is not None
        return dq.view(query.shape)

    def _weights(
        self, rows_q: Tensor, spans: list[TileSpan], lse: Tensor | None, want_lse: bool
    ) -> tuple[list[Tensor], Tensor | None, list[Tensor] | None]:
        """Return the softmax weights of each span, the log-sum-exp, and (soft-capping) the slopes of the cap."""
        scores = [self._scores(rows_q, span, number) for number, span in enumerate(spans)]
        slopes = None
        if self.softcap is not None:
            slopes = []
            for score in scores:
                score.div_(self.softcap).tanh_()
                slopes.append(1 - score * score)
                score.mul_(self.softcap)
            for score, span in zip(scores, spans, strict=True):
                if span.bias is not None:
                    score += span.bias
        if lse is not None:
            return [score.sub_(lse[..., None]).exp_() for score in scores], lse, slopes
        if len(scores) == 1:
            top = scores[0].amax(-1) if want_lse else None
            # In place on a CPU, where a second tile would not fit the cache beside the first.
            in_place = scores[0] if scores[0].device.type == "cpu" else None
            weights = torch.softmax(scores[0], -1, out=in_place)
            # The largest weight is exp(top - lse), and never underflows.
            return [weights], None if top is None else top - weights.amax(-1).log(), slopes
        top = scores[0].amax(-1, keepdim=True)
        for score in scores[1:]:
            top = torch.maximum(top, score.amax(-1, keepdim=True))
        top = top.masked_fill(top == float("-inf"), 0.0)
        total = torch.zeros_like(top)
        for score in scores:
            total += score.sub_(top).exp_().sum(-1, keepdim=True)
        for score in scores:
            score.div_(total)
        return scores, (top + total.log()).squeeze(-1), slopes

    def _scores(self, rows_q: Tensor, span: TileSpan, number: int) -> Tensor:
        key = span.key.to(rows_q.dtype)
        shape = (rows_q.shape[0], rows_q.shape[1], key.shape[1])
        out = self._buffer(f"score{number}", rows_q, shape)
        bias = span.bias if self.softcap is None else None
        if bias is None:
            return torch.baddbmm(out, rows_q, key.mT, beta=0, alpha=self.scale, out=out)
        return torch.baddbmm(bias, rows_q, key.mT, alpha=self.scale, out=out)

    def _rows(self, x: Tensor, key: Tensor) -> Tensor:
        """Return [H, C, D] as [H_kv, M, D] in the dtype of the computation: the query heads of a key head are rows."""
        if x.shape[0] != key.shape[0]:
            x = x.reshape(key.shape[0], -1, x.shape[-1])
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def _buffer(self, name: str, like: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        shape = tuple(like.shape) if shape is None else shape
        if (name, shape) not in self._buffers:
            self._buffers[name, shape] = like.new_empty(shape)
        return self._buffers[name, shape]

    def _drop_masks(self, weights: list[Tensor]) -> list[Tensor] | None:
        """Return the factors 0 or 1 / (1 - dropout) of the next tile's weights; None without dropout."""
        if not self.dropout:
            return None
        generator = torch.Generator(weights[0].device).manual_seed((self.seed + self.tiles) % 2**63)
        self.tiles += 1
        keep = 1.0 - self.dropout
        return [torch.empty_like(w).bernoulli_(keep, generator=generator).div_(keep) for w in weights]

    def _drop(self, weights: list[Tensor]) -> None:
        for weight, factor in zip(weights, self._drop_masks(weights) or (), strict=False):
            weight.mul_(factor)
