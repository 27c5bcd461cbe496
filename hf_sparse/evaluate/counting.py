"""What really ran while a row of figures was made: the proof that they are of the sparse path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..backends.call import CallRecord


@dataclass(frozen=True)
class Counted:
    """Attention calls that went through hf_sparse.

    calls: how many; layers: which ones they came from; ran: calls per "backend/operator".
    pairs, dense_pairs: (query, key) pairs the plans computed, and those of dense attention.
    """

    calls: int = 0
    layers: frozenset[int] = frozenset()
    ran: dict[str, int] = field(default_factory=dict)
    pairs: int = 0
    dense_pairs: int = 0

    @classmethod
    def of(cls, records: Iterable[CallRecord]) -> Counted:
        """Return what a recorder saw."""
        found = list(records)
        return cls(
            len(found),
            frozenset(call.layer for call in found),
            dict(sorted(Counter(f"{call.backend}/{call.operator}" for call in found).items())),
            sum(call.pairs for call in found),
            sum(call.dense_pairs for call in found),
        )

    @classmethod
    def of_rows(cls, rows: Iterable[dict[str, Any]]) -> Counted:
        """Return the sum over rows that hold `as_row`."""
        total = cls()
        for row in rows:
            ran = Counter(total.ran) + Counter(row["ran"])
            total = cls(
                total.calls + row["calls"],
                total.layers | frozenset(row["layers"]),
                dict(sorted(ran.items())),
                total.pairs + row["pairs"],
                total.dense_pairs + row["dense_pairs"],
            )
        return total

    @property
    def density(self) -> float:
        """Pairs computed as a share of dense attention's; nan where nothing ran."""
        return self.pairs / self.dense_pairs if self.dense_pairs else float("nan")

    def as_row(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "calls": self.calls,
            "layers": sorted(self.layers),
            "ran": self.ran,
            "pairs": self.pairs,
            "dense_pairs": self.dense_pairs,
        }
