"""What a pattern costs at each length, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..patterns import Pattern
from ..plan import Constraint, cost

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Layer:
    """The attention layer whose cost is asked for: query heads, heads of keys and values, head size, element type."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    causal: bool
    index: int = 0

    def __str__(self) -> str:
        groups = "" if self.kv_heads == self.heads else f" on {self.kv_heads} of keys and values"
        kind = "causal" if self.causal else "bidirectional"
        return f"{self.heads} heads{groups}, head size {self.head_dim}, {self.dtype}, {kind}"


def cost_table(pattern: Pattern, lengths: Sequence[int], layer: Layer) -> str:
    """Return a row per length: density, pairs per head, FLOPs, KV bytes per decoding step, limit against dense."""
    rows = [("tokens", "density", "pairs per head", "FLOPs", "KV read per step", "limit")]
    for length in lengths:
        found = cost(
            pattern,
            length,
            constraint=Constraint(causal=layer.causal),
            heads=layer.heads,
            kv_heads=layer.kv_heads,
            head_dim=layer.head_dim,
            dtype_bytes=DTYPE_BYTES[layer.dtype],
            layer=layer.index,
        )
        step = (
            scaled(found.kv_bytes_per_step, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
            if layer.causal
            else "none"
        )
        rows.append(
            (
                f"{length:,}",
                f"{100 * found.density:.3g}%",
                f"{found.pairs:,.1f}".removesuffix(".0"),
                scaled(found.flops, 1000, ("", "K", "M", "G", "T", "P", "E")),
                step,
                f"{found.limit:,.2f}x",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["   ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    notes = [
        "FLOPs: both products of the forward pass, all heads",
        "KV read per step: the keys and values of all heads that decoding one more token reads",
        "limit: dense pairs / pairs, the speed-up over dense attention if every pair costs the same",
    ]
    return "\n".join([f"one layer: {layer}", "", *table, "", *notes])


def scaled(amount: float, base: int, units: Sequence[str]) -> str:
    """Return an amount with four digits and the unit that leaves at most as many before the point."""
    power = 0
    while amount >= base and power < len(units) - 1:
        amount, power = amount / base, power + 1
    return f"{amount:.4g} {units[power]}".rstrip()
