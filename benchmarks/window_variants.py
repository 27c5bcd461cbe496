"""Ways to compute a causal window on a CPU, side by side: why the `torch` backend works in tiles.

    python -m benchmarks.window_variants [--length 16384] [--window 512]

All are exact and forward only; the time is for one call, the rate counts the window's own pairs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def band(rows: int, width: int, window: int) -> Tensor:
    """Return the bias [rows, width] of rows that end where the keys end."""
    distance = torch.arange(width - rows, width)[:, None] - torch.arange(width)
    return torch.zeros(rows, width).masked_fill_((distance < 0) | (distance >= window), float("-inf"))


def fused_with_mask(q: Tensor, k: Tensor, v: Tensor, window: int, rows: int) -> Tensor:
    """Chunks of rows, one fused call with a bias each."""
    out = torch.empty_like(q)
    out[:, :, :window] = _flash(q[:, :, :window], k[:, :, :window], v[:, :, :window], 0.0, True)[0]
    bias = band(rows, window + rows, window)
    for start in range(window, q.shape[2], rows):
        part, keys = slice(start, start + rows), slice(start - window, start + rows)
        out[:, :, part] = _flash(q[:, :, part], k[:, :, keys], v[:, :, keys], 0.0, False, attn_mask=bias)[0]
    return out


def two_triangles(q: Tensor, k: Tensor, v: Tensor, window: int, rows: int) -> Tensor:
    """Blocks of a window: the own block is causal, the block before is causal in reversed order; two calls, no mask."""
    batch, heads, n, width = q.shape

    def blocks(x: Tensor) -> Tensor:
        x = x.unflatten(2, (n // window, window)).transpose(1, 2)
        return x.reshape(-1, heads, window, width)

    qb, kb, vb = blocks(q), blocks(k), blocks(v)
    own, own_lse = _flash(qb, kb, vb, 0.0, True)
    # Row i of a block sees the keys j > i of the block before: without the last row and the first key, reversed.
    before = (qb[1:, :, :-1].flip(2), kb[:-1, :, 1:].flip(2), vb[:-1, :, 1:].flip(2))
    tail, tail_lse = (x.flip(2) for x in _flash(*before, 0.0, True))
    share = torch.sigmoid(tail_lse - own_lse[1:, :, :-1])[..., None]
    own[1:, :, :-1] = own[1:, :, :-1].lerp(tail, share)
    return own.unflatten(0, (batch, -1)).transpose(1, 2).reshape(batch, heads, n, width)


def tile(q: Tensor, k: Tensor, v: Tensor, window: int, rows: int) -> Tensor:
    """Chunks of rows, two matrix products and a softmax on a tile that stays in the cache: what the backend does."""
    out = torch.empty_like(q)
    out[:, :, :window] = _flash(q[:, :, :window], k[:, :, :window], v[:, :, :window], 0.0, True)[0]
    bias, scale = band(rows, window + rows, window), q.shape[-1] ** -0.5
    scores = torch.empty(q.shape[1], rows, window + rows)
    for start in range(window, q.shape[2], rows):
        part, keys = slice(start, start + rows), slice(start - window, start + rows)
        torch.baddbmm(bias, q[0, :, part], k[0, :, keys].mT, alpha=scale, out=scores)
        torch.softmax(scores, -1, out=scores)
        out[0, :, part] = torch.bmm(scores, v[0, :, keys])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=16384, help="tokens, a multiple of the window")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    q, k, v = (torch.randn(1, 8, args.length, 64) for _ in range(3))
    work: dict[str, Callable[[], Tensor]] = {
        "dense, causal": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
        "two triangles, flipped": partial(two_triangles, q, k, v, args.window, 0),
    }
    for rows in (32, 64, 128):
        work[f"fused with a mask, {rows} rows"] = partial(fused_with_mask, q, k, v, args.window, rows)
        work[f"tile, {rows} rows"] = partial(tile, q, k, v, args.window, rows)
    want = work["tile, 64 rows"]()
    times: dict[str, list[float]] = {name: [] for name in work}
    for name, function in work.items():
        if name != "dense, causal":
            torch.testing.assert_close(function(), want, atol=1e-4, rtol=1e-4)
    for _ in range(args.repeats):
        for name, function in work.items():
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    dense = statistics.median(times["dense, causal"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:28}{median * 1e3:>9.1f} ms{dense / median:>8.2f}x")


if __name__ == "__main__":
    main()
