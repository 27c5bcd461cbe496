"""Intervals for differences between runs on the same tokens: a paired, studentised bootstrap over documents.

Tokens of one document resemble each other, so documents are drawn, not tokens; and both runs are drawn together, so
that what makes a document easy or hard cancels. The interval is the symmetric bootstrap-t (Hall 1988, "On symmetric
bootstrap confidence intervals", JRSS B 50): percentiles of resampled differences are too narrow for few documents; of
the difference divided by its standard error they hold. docs/intervals.md has what each covers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
COVERAGE = 0.95
LEAST_DOCUMENTS = 5  # with fewer, blocks of tokens are drawn instead
BLOCK_TOKENS = 2048
LEAST_GAP = 0.05  # nats/token: a smaller loss is not worth closing, and dividing by it says nothing

_DRAWN_AT_ONCE = 2_000_000  # counts held in memory
# What a resample's standard error is at least, as a share of the sample's: draws of documents that hardly differ have
# next to none, and would give an interval without end.
_LEAST_ERROR = 0.25


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
    a: np.ndarray,
    b: np.ndarray,
    tokens: np.ndarray,
    unit: str = "documents",
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """Return the token-weighted mean of a - b, in nats/token, with its interval.

    Args:
        a, b: [units] nats summed over each unit, of two runs on the same tokens.
        tokens: [units] tokens scored in each unit.
    """
    return _interval(a - b, tokens, unit, seed, resamples)


def gap_closed(
    sparse_adapted: np.ndarray,
    dense_adapted: np.ndarray,
    sparse: np.ndarray,
    dense: np.ndarray,
    tokens: np.ndarray,
    unit: str = "documents",
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> GapClosed:
    """Return ``1 - (L_sparse,adapted - L_dense,adapted) / (L_sparse,0 - L_dense,0)`` with its interval.

    There is no gap to close where the untrained gap is below 0.05 nats/token or its interval reaches 0.

    Args:
        sparse_adapted, dense_adapted, sparse, dense: [units] nats summed over each unit, all on the same tokens.
        tokens: [units] tokens scored in each unit.
    """
    gap = difference(sparse, dense, tokens, unit, seed, resamples)
    residual = difference(sparse_adapted, dense_adapted, tokens, unit, seed, resamples)
    if not (gap.estimate >= LEAST_GAP and gap.low > 0):
        return GapClosed(gap, None, residual)
    lost = sparse - dense
    won_back = lost - (sparse_adapted - dense_adapted)
    return GapClosed(gap, _interval(won_back, lost, unit, seed, resamples), residual)


def _interval(part: np.ndarray, whole: np.ndarray, unit: str, seed: int, resamples: int) -> Interval:
    """Return sum(part) / sum(whole), both [units], with its interval."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    units = len(part)
    if units == 0:
        raise ValueError("there is nothing to compare: 0 documents were scored.")
    estimate = float(part.sum() / whole.sum())
    if units == 1:
        return Interval(estimate, float("nan"), float("nan"), unit, 1)
    residual = part - estimate * whole
    error = np.sqrt(residual @ residual * units / (units - 1)) / abs(whole.sum())  # of a ratio, linearised
    if error == 0:
        return Interval(estimate, estimate, estimate, unit, units)
    distances = _studentised_distances(residual, whole, error, seed, resamples)
    half = float(error * np.quantile(distances, COVERAGE, method="higher"))
    return Interval(estimate, estimate - half, estimate + half, unit, units)


def _studentised_distances(
    residual: np.ndarray, whole: np.ndarray, error: float, seed: int, resamples: int
) -> np.ndarray:
    """Return how far the ratio of each resample lies from the sample's, in its own standard errors, [resamples].

    All a resample needs are sums over what it drew, hence one product of counts [resamples, units] with five columns.
    """
    units = len(whole)
    columns = np.stack([residual, whole, residual**2, residual * whole, whole**2])
    generator = np.random.default_rng(seed)
    at_once = max(1, _DRAWN_AT_ONCE // units)
    found = []
    for first in range(0, resamples, at_once):
        rows = min(at_once, resamples - first)
        drawn = generator.integers(units, size=(rows, units)) + units * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * units).reshape(rows, units)
        r, w, rr, rw, ww = columns @ counts.T
        with np.errstate(divide="ignore", invalid="ignore"):
            shift = r / w
            squares = np.maximum(rr - 2 * shift * rw + shift**2 * ww, 0)
            own_error = np.sqrt(squares * units / (units - 1)) / abs(w)
            distance = abs(shift) / np.maximum(own_error, _LEAST_ERROR * error)
        found.append(np.where(w == 0, np.inf, distance))  # a gap of 0 in all that was drawn
    return np.concatenate(found)
