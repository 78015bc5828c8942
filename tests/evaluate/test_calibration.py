"""Calibration and abstaining: worked examples, brute force, and models whose honesty is known."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.evaluate.abstain import by_variance, risk_coverage
from luthier.evaluate.calibration import calibrate


def even(count):
    return np.full(count, 1 / count)


def test_calibration_by_hand():
    """Four pairs at 0.75, one of them counted as lost by the flip: every bin is off by 0.25."""
    found = calibrate(np.full(4, 0.75), even(4), bins=2)
    assert found.predicted.tolist() == [0.25, 0.75]
    assert found.observed.tolist() == [0.0, 1.0]
    assert found.weight.tolist() == [0.5, 0.5]
    assert (found.ece, found.mce) == (0.25, 0.25)


def test_calibration_is_the_loop():
    rng = np.random.default_rng(0)
    p, weight = rng.uniform(size=200), rng.exponential(size=200)
    weight /= weight.sum()
    found = calibrate(p, weight, bins=20)
    sums = {}
    for probability, won, share in [*zip(p, [1] * 200, weight), *zip(1 - p, [0] * 200, weight)]:
        entry = sums.setdefault(min(int(probability * 20), 19), [0.0, 0.0, 0.0])
        for i, value in enumerate((share / 2, share / 2 * probability, share / 2 * won)):
            entry[i] += value
    assert found.ece == pytest.approx(sum(abs(a - b) for _, a, b in sums.values()))
    assert found.mce == pytest.approx(max(abs(a - b) / total for total, a, b in sums.values()))
    assert found.weight.sum() == pytest.approx(1)


def test_an_honest_model_is_calibrated_and_a_boaster_is_not():
    rng = np.random.default_rng(1)
    p = rng.uniform(size=200_000)
    # The pair's first answer is the better one by construction, so an honest model is told P or 1 - P.
    honest = np.where(rng.uniform(size=len(p)) < p, p, 1 - p)
    assert calibrate(honest, even(len(p))).ece < 0.005
    right = rng.uniform(size=len(p)) < 0.7
    assert calibrate(np.where(right, 1.0, 0.0), even(len(p))).ece == pytest.approx(0.3, abs=0.005)
    assert calibrate(np.where(right, 0.7, 0.3), even(len(p))).ece == pytest.approx(0.0, abs=0.005)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_the_edges_of_the_bins(p):
    found = calibrate(np.array([p]), np.ones(1))
    assert found.weight.sum() == pytest.approx(1)
    assert found.ece == pytest.approx(1 - p if p != 0.5 else 0.0)


def test_risk_coverage_by_hand():
    """Kept one by one: 0/1, 1/2, 1/3, 2/4 wrong; the area is their mean."""
    found = risk_coverage(np.array([3.0, 1.0, 2.0, 4.0]), np.array([0, 0, 1, 1]), even(4))
    assert found.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert found.risk == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert found.aurc == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)


def test_risk_coverage_is_the_loop():
    rng = np.random.default_rng(2)
    uncertainty, wrong = rng.normal(size=50), rng.integers(0, 2, 50)
    weight = rng.exponential(size=50)
    weight /= weight.sum()
    found = risk_coverage(uncertainty, wrong, weight)
    for threshold, coverage, risk in zip(np.sort(uncertainty), found.coverage, found.risk):
        kept = uncertainty <= threshold
        assert coverage == pytest.approx(weight[kept].sum())
        assert risk == pytest.approx(np.average(wrong[kept], weights=weight[kept]))
    assert found.coverage[-1] == 1.0 and found.risk[-1] == pytest.approx(weight @ wrong)


def test_equally_unsure_pairs_come_in_together_whatever_their_order():
    wrong = np.array([1, 0, 0, 0])
    for order in (wrong, wrong[::-1]):
        found = risk_coverage(np.ones(4), order, even(4))
        assert (found.coverage.tolist(), found.risk.tolist(), found.aurc) == ([1.0], [0.25], 0.25)


def test_knowing_ones_errors_makes_the_area_smaller():
    rng = np.random.default_rng(3)
    wrong, noise = rng.integers(0, 2, 1000), rng.uniform(size=1000)
    knowing, ignorant, deluded = (risk_coverage(u, wrong, even(1000)).aurc for u in (wrong + noise / 2, noise, -wrong))
    assert knowing < 0.2 < ignorant < 0.6 < deluded


def test_deciles_by_hand():
    rng = np.random.default_rng(4)
    variance = rng.permutation(np.arange(1.0, 101.0))
    found = by_variance(variance, variance <= 55, even(100))
    assert found.count.tolist() == [10] * 10
    assert found.variance == pytest.approx(np.arange(5.5, 100, 10))
    assert found.accuracy == pytest.approx([1, 1, 1, 1, 1, 0.5, 0, 0, 0, 0])


def test_few_pairs_make_few_groups_and_weights_count():
    found = by_variance(np.array([2.0, 1.0, 1.0]), np.array([True, False, True]), np.array([0.5, 0.25, 0.25]), groups=1)
    assert (found.count.tolist(), found.variance.tolist(), found.accuracy.tolist()) == ([3], [1.5], [0.75])
    assert len(by_variance(np.ones(3), np.ones(3), even(3)).count) == 3
