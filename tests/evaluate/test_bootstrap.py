"""Intervals against what is known without drawing anything, and how often they hold the truth of a simulation."""

import itertools
import math
import runpy
from pathlib import Path

import numpy as np
import pytest

from hf_sparse.evaluate import difference, gap_closed

SIMULATION = runpy.run_path(str(Path(__file__).resolve().parents[2] / "recipes" / "check_intervals.py"))


def test_interval_of_a_mean_is_that_of_the_normal_law():
    generator = np.random.default_rng(1)
    units = 400
    tokens = np.full(units, 50)
    losses = generator.normal(0.3, 0.2, units)  # nats/token of each document
    base = generator.normal(3.0, 1.0, units)  # what documents have in common: paired, it cancels
    found = difference((base + losses) * tokens, base * tokens, tokens)
    half = 1.96 * losses.std() / math.sqrt(units)
    assert found.estimate == pytest.approx(losses.mean())
    assert (found.low, found.high) == pytest.approx(
        (losses.mean() - half, losses.mean() + half), abs=0.1 * half
    )
    assert (found.unit, found.units, found.excludes_zero()) == ("documents", units, True)


def test_documents_weigh_what_they_hold():
    tokens = np.array([1000, 10])
    found = difference(np.array([1000.0, 0.0]), np.array([0.0, 0.0]), tokens)
    assert found.estimate == pytest.approx(1000 / 1010)
    # Two units say little: unlike percentiles of the resamples, the interval reaches beyond both of them.
    assert found.low < 0 and 1 < found.high < math.inf


def test_interval_from_every_resample_there_is():
    """Six documents have 46,656 resamples; their distances in standard errors are all computed here from the rows."""
    nats, tokens = np.array([9.0, 10, 15, 19, 1, 3]), np.array([34.0, 38, 17, 19, 36, 22])
    estimate = nats.sum() / tokens.sum()

    def standard_error(d, t):
        residual = d - (d.sum(-1) / t.sum(-1))[..., None] * t
        return np.sqrt(6 / 5 * (residual**2).sum(-1)) / t.sum(-1)

    drawn = np.array(list(itertools.product(range(6), repeat=6)))
    d, t = nats[drawn], tokens[drawn]
    error = standard_error(nats, tokens)
    distances = abs(d.sum(-1) / t.sum(-1) - estimate) / np.maximum(standard_error(d, t), error / 4)
    half = np.quantile(distances, 0.95) * error
    found = difference(nats, np.zeros(6), tokens)
    # among 10,000 drawn the share beyond a point has a standard error of 0.2 %, over which `distances` grow by 0.5 %
    assert (found.low, found.high) == pytest.approx((estimate - half, estimate + half), rel=0.01)


def test_most_documents_without_a_difference():
    """Documents within the window lose nothing; where resamples have only such, the interval stays finite."""
    nats = np.zeros(20)
    nats[:2] = 8.0
    found = difference(nats, np.zeros(20), np.full(20, 10))
    assert found.low < 0 < found.high < 0.5


def test_resamples_without_any_gap():
    gap = np.where(np.arange(100) < 10, 10.0, 0.0)  # one resample in 38,000 has none: 0 / 0
    left = gap * np.linspace(0.1, 0.9, 100)
    zero = np.zeros(100)
    found = gap_closed(left, zero, gap, zero, np.full(100, 10), resamples=200_000)
    assert found.closed is not None
    assert 0.8 < found.closed.low < found.closed.estimate < found.closed.high < 0.9


def test_equal_runs_differ_by_nothing():
    nats, tokens = np.arange(1.0, 21.0), np.full(20, 7)
    found = difference(nats, nats, tokens)
    assert (found.estimate, found.low, found.high, found.excludes_zero()) == (0, 0, 0, False)


def test_same_seed_same_interval():
    generator = np.random.default_rng(0)
    a, b, tokens = generator.random(30), generator.random(30), np.full(30, 3)
    assert difference(a, b, tokens, seed=5) == difference(a, b, tokens, seed=5)
    assert difference(a, b, tokens, seed=5) != difference(a, b, tokens, seed=6)


def test_one_unit_has_no_interval():
    found = difference(np.array([5.0]), np.array([4.0]), np.array([10]))
    assert found.estimate == pytest.approx(0.1)
    assert math.isnan(found.low) and math.isnan(found.high) and not found.excludes_zero()
    assert "no interval" in str(found)
    with pytest.raises(ValueError, match="nothing to compare"):
        difference(np.array([]), np.array([]), np.array([]))


def test_gap_closed_where_every_document_agrees():
    tokens = np.arange(100, 130)
    dense, sparse = 3.0 * tokens, 3.4 * tokens
    found = gap_closed(3.0 * tokens, 2.9 * tokens, sparse, dense, tokens)  # 0.1 of 0.4 is left
    assert found.closed is not None
    assert (found.closed.estimate, found.closed.low, found.closed.high) == pytest.approx((0.75, 0.75, 0.75))
    assert found.gap.estimate == pytest.approx(0.4) and found.residual.estimate == pytest.approx(0.1)
    assert str(found) == "75.0% [75.0%, 75.0%]"


def test_gap_closed_interval_covers_the_noise_of_both_gaps():
    generator = np.random.default_rng(3)
    tokens = np.full(300, 100)
    gap, left = generator.normal(0.4, 0.1, 300), generator.normal(0.2, 0.1, 300)
    found = gap_closed(
        (3 + left) * tokens, np.full(300, 3.0) * tokens, (3 + gap) * tokens, 3.0 * tokens, tokens
    )
    ratio = left.mean() / gap.mean()
    # first-order error of a ratio of means
    half = 1.96 * np.std((left - ratio * gap) / gap.mean()) / math.sqrt(300)
    assert found.closed is not None
    assert found.closed.estimate == pytest.approx(1 - ratio)
    assert found.closed.high - found.closed.low == pytest.approx(2 * half, rel=0.1)


@pytest.mark.parametrize(
    "gap", [np.full(20, 0.04), np.tile([1.0, -0.8], 10), np.full(20, -0.5), np.full(1, 0.4)]
)
def test_no_gap_to_close(gap):
    tokens = np.full(len(gap), 10)
    zero = np.zeros(len(gap))
    found = gap_closed(zero, zero, gap * tokens, zero, tokens)
    assert found.closed is None
    assert str(found).startswith("no gap to close")


@pytest.mark.parametrize("documents", [8, 20, 100])
def test_intervals_hold_the_true_difference(documents):
    """2,000 data sets of documents with lengths from 64 to 8,192 tokens, mildly skewed losses and token noise."""
    random = np.random.default_rng(documents)
    setting = SIMULATION["MAIN"]
    truth = SIMULATION["true_difference"](setting, random)
    none = np.zeros(documents)
    held = 0
    for seed in range(2000):
        nats, tokens = SIMULATION["simulate"](setting, (documents,), random)
        found = difference(nats, none, tokens, seed=seed, resamples=999)
        held += found.low <= truth <= found.high
    assert 0.93 <= held / 2000 <= 0.97


def test_percentiles_hold_it_too_seldom():
    """The simulation can tell: what is usually called the bootstrap fails it with 8 documents."""
    random = np.random.default_rng(8)
    truth = SIMULATION["true_difference"](SIMULATION["MAIN"], random)
    held = 0
    for _ in range(2000):
        nats, tokens = SIMULATION["simulate"](SIMULATION["MAIN"], (8,), random)
        low, high = SIMULATION["percentile"](nats, tokens, SIMULATION["draw_counts"](8, 999, random))
        held += low <= truth <= high
    assert held / 2000 < 0.9


@pytest.mark.parametrize("documents", [8, 20])
def test_intervals_hold_the_gap_closed(documents):
    held = SIMULATION["cover_gap"](SIMULATION["MAIN"], documents, 2000, 999, seed=documents)
    assert 0.93 <= held <= 0.97
