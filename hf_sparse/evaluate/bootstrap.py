"""Intervals for differences between runs on the same tokens: a paired bootstrap over documents.

Tokens of one document resemble each other, so documents are drawn, not tokens; and both runs are drawn together, so
that what makes a document easy or hard cancels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEAST_DOCUMENTS = 5  # with fewer, blocks of tokens are drawn instead
BLOCK_TOKENS = 2048
LEAST_GAP = 0.05  # nats/token: a smaller loss is not worth closing, and dividing by it says nothing

_DRAWN_AT_ONCE = 2_000_000  # counts held in memory


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval; low and high are nan where there is only one unit to draw.

    unit: what was drawn, "documents" or "blocks of 2048 tokens"; units: how many there are.
    """

    estimate: float
    low: float
    high: float
    unit: str
    units: int

    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        if np.isnan(self.low):
            return f"{self.estimate:+.4f} (one of the {self.unit}: no interval)"
        return f"{self.estimate:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True)
class GapClosed:
    """The share of the untrained loss that adaptation won back.

    gap: L_sparse - L_dense without adaptation, in nats/token.
    closed: 1 - (L_sparse,adapted - L_dense,adapted) / gap; None where there is no gap to close.
    residual: L_sparse,adapted - L_dense,adapted, in nats/token.
    """

    gap: Interval
    closed: Interval | None
    residual: Interval

    def __str__(self) -> str:
        if self.closed is None:
            return f"no gap to close (untrained {self.gap} nats/token)"
        c = self.closed
        return f"{c.estimate:.1%} [{c.low:.1%}, {c.high:.1%}]"


def difference(
    a: np.ndarray, b: np.ndarray, tokens: np.ndarray, unit: str = "documents", seed: int = 0
) -> Interval:
    """Return the token-weighted mean of a - b, in nats/token, with its interval.

    Args:
        a, b: [units] nats summed over each unit, of two runs on the same tokens.
        tokens: [units] tokens scored in each unit.
    """
    return _interval([a - b, tokens], lambda sums: sums[0] / sums[1], unit, seed)


def gap_closed(
    sparse_adapted: np.ndarray,
    dense_adapted: np.ndarray,
    sparse: np.ndarray,
    dense: np.ndarray,
    tokens: np.ndarray,
    unit: str = "documents",
    seed: int = 0,
) -> GapClosed:
    """Return ``1 - (L_sparse,adapted - L_dense,adapted) / (L_sparse,0 - L_dense,0)`` with its interval.

    There is no gap to close where the untrained gap is below 0.05 nats/token or its interval reaches 0.

    Args:
        sparse_adapted, dense_adapted, sparse, dense: [units] nats summed over each unit, all on the same tokens.
        tokens: [units] tokens scored in each unit.
    """
    gap = difference(sparse, dense, tokens, unit, seed)
    residual = difference(sparse_adapted, dense_adapted, tokens, unit, seed)
    if not (gap.estimate >= LEAST_GAP and gap.low > 0):
        return GapClosed(gap, None, residual)
    parts = [sparse_adapted - dense_adapted, sparse - dense]
    return GapClosed(gap, _interval(parts, lambda sums: 1 - sums[0] / sums[1], unit, seed), residual)


def _interval(
    parts: list[np.ndarray], statistic: Callable[[np.ndarray], np.ndarray], unit: str, seed: int
) -> Interval:
    """Bootstrap `statistic` of sums: it gets the sum of each part, [parts, resamples], and gives [resamples]."""
    table = np.stack([np.asarray(part, dtype=np.float64) for part in parts])  # [parts, units]
    units = table.shape[1]
    if units == 0:
        raise ValueError("there is nothing to compare: 0 documents were scored.")
    estimate = float(statistic(table.sum(axis=1, keepdims=True))[0])
    if units == 1:
        return Interval(estimate, float("nan"), float("nan"), unit, 1)
    generator = np.random.default_rng(seed)
    draws = []
    at_once = max(1, _DRAWN_AT_ONCE // units)
    for first in range(0, RESAMPLES, at_once):
        counts = generator.multinomial(units, np.full(units, 1 / units), size=min(at_once, RESAMPLES - first))
        draws.append(statistic(table @ counts.T))
    low, high = np.percentile(np.concatenate(draws), [2.5, 97.5])
    return Interval(estimate, float(low), float(high), unit, units)
