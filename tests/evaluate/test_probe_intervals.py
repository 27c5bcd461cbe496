"""Intervals of shares, of one run and of one run above another: what they are worth with few samples."""

import numpy as np
import pytest

from hf_sparse.evaluate.probes.result import newcombe, wilson


def answers(both, first_only, second_only, neither):
    """Right or wrong, 1 or 0, of two runs on the same samples."""
    pairs = [(1, 1)] * both + [(1, 0)] * first_only + [(0, 1)] * second_only + [(0, 0)] * neither
    return (*np.array(pairs, dtype=float).T, np.ones(len(pairs)))


def test_wilson_interval():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for right, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = wilson(right / trials, trials)
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert wilson(1.0, 5).high == pytest.approx(1.0)


def test_paired_interval():
    # Newcombe 1998 on paired data, method 10: 36, 12, 2 and 0 of 50 pairs
    found = newcombe(*answers(36, 12, 2, 0))
    assert (found.estimate, found.low, found.high) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)
    turned = newcombe(*answers(36, 2, 12, 0))
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))


@pytest.mark.parametrize("table", [(0, 5, 0, 0), (5, 0, 0, 0), (0, 0, 0, 5), (3, 0, 0, 2), (0, 3, 2, 0)])
def test_five_samples_never_give_certainty(table):
    found = newcombe(*answers(*table))
    assert -1 <= found.low <= found.estimate <= found.high <= 1
    assert found.high - found.low > 0.2
    assert (found.unit, found.units) == ("samples", 5)


def test_the_interval_covers_the_difference():
    """Both runs know some samples, and guess at the others."""
    random = np.random.default_rng(0)
    for known, one, two in ((0.0, 0.5, 0.5), (0.5, 0.6, 0.2), (0.8, 0.5, 0.0)):
        truth, held = (1 - known) * (one - two), []
        for _ in range(500):
            is_known = random.random(20) < known
            a, b = ((is_known | (random.random(20) < share)).astype(float) for share in (one, two))
            found = newcombe(a, b, np.ones(20))
            held.append(found.low <= truth <= found.high)
        assert 0.92 <= np.mean(held) <= 0.995


def test_shares_of_tokens_count_a_sample_once():
    a, b, tokens = np.array([4.0, 2, 4]), np.array([0.0, 0, 4]), np.array([4, 4, 8])
    found = newcombe(a, b, tokens)
    assert found.estimate == pytest.approx((10 - 4) / 16) and found.units == 3
