"""Intervals against what is known without drawing anything."""

import math

import numpy as np
import pytest

from hf_sparse.evaluate import difference, gap_closed


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
    assert (found.low, found.high) == pytest.approx((0.0, 1.0))


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
