"""Which backend `auto` tries first: a small table of plain values, one row per kind of call.

Every row says where its order comes from; rows that nobody has measured say so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One kind of call, and the backends to try in this order; the first that supports the call is taken.

    device: device type. dtypes: names of dtypes. queries: from so many queries in the longest sequence on.
    source: where the order comes from.
    """

    device: str
    dtypes: tuple[str, ...]
    queries: int
    backends: tuple[str, ...]
    source: str


_HALF = ("float16", "bfloat16")

# The first row that fits is taken; `torch`, which supports every call, where none does.
TABLE = (
    Row(
        "cuda",
        _HALF,
        1024,
        ("cuda_flash", "flex"),
        "not measured yet: the operators need no compilation and have hand-written backward kernels; block masks cover "
        "the patterns that the operators do not know",
    ),
    Row(
        "cuda",
        _HALF,
        1,
        ("cuda_flash",),
        "not measured yet: below 1,024 queries a compiled kernel costs more to make than it saves",
    ),
    Row("cuda", ("float32",), 1024, ("flex",), "not measured yet: no other fused kernel takes float32"),
)


def order(device: str, dtype: str, queries: int) -> tuple[str, ...]:
    """Return the backends to try for a kind of call, best first; `torch` is always the last."""
    for row in TABLE:
        if row.device == device and dtype in row.dtypes and queries >= row.queries:
            return (*row.backends, "torch")
    return ("torch",)
