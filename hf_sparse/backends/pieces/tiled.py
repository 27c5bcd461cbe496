"""Masked softmax over cache-sized tiles of scores: the operator for spans with a mask, dropout or soft-capping.

On a CPU batched matrix products and a softmax on tiles that stay in the cache are faster than the fused operator with a
mask, which works on 32 rows at a time and reads the mask as well (benchmarks/README.md). All that a row reads stands
side by side in one buffer, so that several spans need one softmax. Everything is computed in float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass
class TileSpan:
    """Keys read by the rows of T tiles.

    key: [T, S, D], or [S, D] where all tiles read the same; value: likewise with Dv.
    bias: [M, S] or [T, M, S], 0 = may attend, -inf = not; None when every row sees all.
    wider: gives key and value with so many of the keys before them as well, or None where there are not that many.
    give: takes the gradients of key and value, good until the next call.
    """

    key: Tensor
    value: Tensor
    bias: Tensor | None = None
    wider: Callable[[int], tuple[Tensor, Tensor] | None] | None = None
    give: Callable[[Tensor, Tensor], None] | None = None

    @property
    def width(self) -> int:
        return self.key.shape[-2]

    @property
    def constant(self) -> bool:
        return self.key.dim() == 2


@dataclass
class Tiled:
    """One call's fixed numbers, and buffers reused from tile to tile.

    scale, softcap, dropout: as in `Call`.
    seed: of the dropout masks; the i-th call draws from a generator seeded with seed + i, so that the backward pass
        draws the same.
    """

    scale: float
    softcap: float | None = None
    dropout: float = 0.0
    seed: int = 0
    calls: int = 0
    _buffers: dict[str, Tensor] = field(default_factory=dict)

    def forward(
        self, query: Tensor, spans: list[TileSpan], empty: Tensor | None, want_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output [T, M, Dv], good until the next call, and, if wanted, the log-sum-exp [T, M].

        Args:
            query: [T, M, D] in the dtype of the computation.
            empty: [M] or [T, M] bool, rows that see no key (their bias is 0): output 0, log-sum-exp -inf.
        """
        weights, lse, _ = self._weights(query, spans, empty, None, want_lse)
        if (kept := self._kept(weights)) is not None:
            weights.mul_(kept)
        values = [span.value for span in spans]
        out = self._sum("out", weights, spans, values, 1.0)
        if empty is not None:
            out.masked_fill_(empty[..., None], 0.0)
            lse = lse.masked_fill(empty, float("-inf")) if lse is not None else None
        return out, lse

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        spans: list[TileSpan],
        out: Tensor | None,
        lse: Tensor | None,
        empty: Tensor | None,
    ) -> Tensor:
        """Return dq [T, M, D], good until the next call, and give the spans their gradients.

        Args:
            grad, out: [T, M, Dv]; `out` and `lse` [T, M] are those of everything the rows see. Both are None when the
                rows see these spans only; the softmax is then taken anew.
        """
        if lse is not None and empty is not None:
            lse = lse.masked_fill(empty, 0.0)  # exp(score - -inf) would be infinite
        weights, _, slopes = self._weights(query, spans, empty, lse, False)
        if empty is not None:
            weights.masked_fill_(empty[..., None], 0.0)
        kept = self._kept(weights)
        used = weights if kept is None else weights * kept
        dweight = self._products("dweight", grad, spans, of_values=True)
        if kept is not None:
            dweight.mul_(kept)
        if lse is None:
            dscore = self._buffer("dscore", weights, tuple(weights.shape))
            torch.ops.aten._softmax_backward_data.out(dweight, weights, -1, weights.dtype, grad_input=dscore)
        else:
            assert out is not None
            dscore = dweight.sub_((grad * out).sum(-1, keepdim=True)).mul_(weights)
        if slopes is not None:
            dscore.mul_(slopes)
        for span, columns in _columns(spans):
            if span.give is not None:
                dvalue = self._transposed("dvalue", used[..., columns], grad, span, 1.0)
                span.give(self._transposed("dkey", dscore[..., columns], query, span, self.scale), dvalue)
        return self._sum("dquery", dscore, spans, [span.key for span in spans], self.scale)

    def _weights(
        self,
        query: Tensor,
        spans: list[TileSpan],
        empty: Tensor | None,
        lse: Tensor | None,
        want_lse: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the softmax weights [T, M, W], the log-sum-exp, and (soft-capping) the slopes of the cap."""
        scores = self._products("score", query, spans, of_values=False)
        slopes = None
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_()
            slopes = 1 - scores * scores
            scores.mul_(self.softcap)
            self._mask(scores, spans)
        if empty is not None:
            # A softmax of nothing is nan: such rows are computed over all keys, and their result is dropped.
            scores.masked_fill_(empty[..., None], 0.0)
        if lse is not None:
            return scores.sub_(lse[..., None]).exp_(), lse, slopes
        top = scores.amax(-1) if want_lse else None
        # In place on a CPU, where a second tile would not fit the cache beside the first.
        weights = torch.softmax(scores, -1, out=scores if scores.device.type == "cpu" else None)
        # The largest weight is exp(top - lse), and never underflows.
        return weights, None if top is None else top - weights.amax(-1).log(), slopes

    def _products(self, name: str, rows: Tensor, spans: list[TileSpan], *, of_values: bool) -> Tensor:
        """Return rows [T, M, D] times the keys (scaled and masked) or values of the spans, [T, M, W]."""
        shape = (rows.shape[0], rows.shape[1], sum(span.width for span in spans))
        scores = self._buffer(name, rows, shape)
        alpha = 1.0 if of_values else self.scale
        masked = not of_values and self.softcap is None
        moving = [span for span in spans if not span.constant]
        before = sum(span.width for span in spans if span.constant)
        # A batched product writes whole tiles only: where one span moves, it covers the columns of the constant ones
        # too, which are overwritten.
        whole = _widened(moving[0], before) if len(moving) == 1 else None
        for span, columns in _columns(spans):
            x = span.value if of_values else span.key
            if span.constant:
                continue
            if whole is not None:
                bias = span.bias if masked else None
                if bias is not None and before:
                    bias = pad(bias, (before, 0))
                start = scores if bias is None else bias
                torch.baddbmm(
                    start,
                    rows,
                    whole[of_values].mT,
                    beta=float(bias is not None),
                    alpha=alpha,
                    out=scores,
                )
                continue
            part = self._buffer("part", rows, (*shape[:2], span.width))
            torch.baddbmm(part, rows, x.mT, beta=0, alpha=alpha, out=part)
            if masked and span.bias is not None:
                part += span.bias
            scores[..., columns] = part
        flat = scores.view(-1, shape[2])
        for span, columns in _columns(spans):
            if span.constant:
                x, place = span.value if of_values else span.key, flat[:, columns]
                torch.addmm(place, rows.reshape(-1, rows.shape[2]), x.mT, beta=0, alpha=alpha, out=place)
                if masked and span.bias is not None:
                    scores[..., columns] += span.bias
        return scores

    def _mask(self, scores: Tensor, spans: list[TileSpan]) -> None:
        for span, columns in _columns(spans):
            if span.bias is not None:
                scores[..., columns] += span.bias

    def _sum(
        self, name: str, weights: Tensor, spans: list[TileSpan], parts: list[Tensor], alpha: float
    ) -> Tensor:
        """Return the weighted sum of the spans' keys or values, [T, M, D or Dv]."""
        total = self._buffer(name, weights, (*weights.shape[:2], parts[0].shape[-1]))
        flat = total.view(-1, total.shape[2])
        columns = {id(span): c for span, c in _columns(spans)}
        first = True
        for span, part in sorted(zip(spans, parts, strict=True), key=lambda pair: pair[0].constant):
            weight = weights[..., columns[id(span)]]
            beta = 0.0 if first else 1.0
            if span.constant:
                torch.addmm(flat, weight.flatten(0, 1), part, beta=beta, alpha=alpha, out=flat)
            else:
                torch.baddbmm(total, weight, part, beta=beta, alpha=alpha, out=total)
            first = False
        return total

    def _transposed(self, name: str, weight: Tensor, rows: Tensor, span: TileSpan, alpha: float) -> Tensor:
        """Return weight^T times rows, in the shape of the span's key (rows of D) or value (Dv)."""
        shape = (*span.key.shape[:-1], rows.shape[-1])
        out = self._buffer(name, rows, shape)
        if span.constant:
            flat = rows.reshape(-1, rows.shape[2])
            return torch.addmm(out, weight.flatten(0, 1).mT, flat, beta=0, alpha=alpha, out=out)
        return torch.baddbmm(out, weight.mT, rows, beta=0, alpha=alpha, out=out)

    def _buffer(self, name: str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        size = 1
        for length in shape:
            size *= length
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = like.new_empty(size)
        return self._buffers[name][:size].view(shape)

    def _kept(self, weights: Tensor) -> Tensor | None:
        """Return the factors 0 or 1 / (1 - dropout) of the next call's weights; None without dropout."""
        if not self.dropout:
            return None
        generator = torch.Generator(weights.device).manual_seed((self.seed + self.calls) % 2**63)
        self.calls += 1
        keep = 1.0 - self.dropout
        return torch.empty_like(weights).bernoulli_(keep, generator=generator).div_(keep)


def _columns(spans: list[TileSpan]) -> Iterator[tuple[TileSpan, slice]]:
    """Yield the spans with their columns of the scores: constant ones first."""
    start = 0
    for span in sorted(spans, key=lambda span: not span.constant):
        yield span, slice(start, start + span.width)
        start += span.width


def _widened(span: TileSpan, before: int) -> tuple[Tensor, Tensor] | None:
    if not before:
        return span.key, span.value
    return None if span.wider is None else span.wider(before)
