"""Every measure of a judgement against its definition, position by position."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from luthier.evaluate.judgement import cross_entropy, measures


def judged(seed=0, size=60):
    rng = np.random.default_rng(seed)
    target = rng.integers(0, 11, size=size) / 10
    return target, np.clip(target + rng.normal(0, 0.25, size), 0.01, 0.99)


def entropy(y):
    return -sum(part * math.log(part) for part in (y, 1 - y) if part)


def test_all_measures_by_their_definitions():
    target, p = judged()
    found = measures(target, p)
    rows = list(zip(target.tolist(), p.tolist()))
    accept = [y >= 0.5 for y, _ in rows]
    n = len(rows)
    assert found["base_rate"] == pytest.approx(sum(accept) / n)
    assert found["mae"] == pytest.approx(sum(abs(q - y) for y, q in rows) / n)
    assert found["mse"] == pytest.approx(sum((q - y) ** 2 for y, q in rows) / n)
    assert found["rmse"] == pytest.approx(math.sqrt(found["mse"]))
    assert found["spearman"] == pytest.approx(stats.spearmanr(p, target).statistic)
    assert found["brier"] == pytest.approx(sum((q - good) ** 2 for (_, q), good in zip(rows, accept)) / n)
    bce = [-y * math.log(q) - (1 - y) * math.log(1 - q) for y, q in rows]
    assert found["bce"] == pytest.approx(sum(bce) / n)
    assert found["excess_bce"] == pytest.approx(sum(b - entropy(y) for b, (y, _) in zip(bce, rows)) / n)
    for limit in (0.1, 0.2):
        right = [abs(q - y) <= (limit * y if y >= 0.01 else limit) for y, q in rows]
        assert found[f"tolerance_{limit}"] == pytest.approx(sum(right) / n)
    for name, came in (("ece", accept), ("ece_score", target.tolist())):
        gap = 0.0
        for b in range(15):
            inside = [i for i in range(n) if b / 15 <= p[i] < (b + 1) / 15]
            gap += abs(sum(p[i] for i in inside) - sum(came[i] for i in inside)) / n
        assert found[name] == pytest.approx(gap)
    good, bad = p[target >= 0.5], p[target < 0.5]
    assert found["roc_auc"] == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a in good for b in bad]))
    for share in (5, 10):
        caught = [np.mean(bad <= t) for t in [-1, *p] if np.mean(good <= t) <= share / 100]
        assert found[f"reject_recall_at_{share}"] == pytest.approx(max(caught))


def test_a_perfect_judge():
    target = np.array([0.0, 0.3, 0.5, 0.8, 1.0])
    found = measures(target, target)
    assert {found[name] for name in ("roc_auc", "pr_auc", "tolerance_0.1", "reject_recall_at_5")} == {1.0}
    assert found["spearman"] == pytest.approx(1)
    assert found["mae"] == found["ece_score"] == 0
    assert found["excess_bce"] == pytest.approx(0, abs=1e-6) and found["bce"] > 0.3, "soft scores have an entropy"


@pytest.mark.parametrize(
    ("target", "missing"),
    [
        ([0.5, 0.9, 1.0], {"roc_auc", "reject_recall_at_5", "reject_recall_at_10"}),
        ([0.1, 0.2, 0.4], {"roc_auc", "pr_auc", "reject_recall_at_5", "reject_recall_at_10"}),
        ([0.7, 0.7, 0.7], {"roc_auc", "spearman", "reject_recall_at_5", "reject_recall_at_10"}),
    ],
)
def test_what_is_not_defined_is_left_out(target, missing):
    p = np.array([0.2, 0.6, 0.9])
    found = measures(np.array(target), p)
    assert set(measures(*judged())) - set(found) == missing
    assert all(math.isfinite(value) for value in found.values())


def test_certainty_in_float32_has_a_finite_price():
    """sigmoid(17) in float32 is 1: to be wrong there costs what float32 can tell, about 17 nats."""
    wrong = cross_entropy(np.array([0.0, 1.0]), np.array([1.0, 0.0]))
    assert wrong[0] == pytest.approx(25 * math.log(2)) and 80 < wrong[1] < 90
    assert cross_entropy(np.array([0.0, 1.0]), np.array([0.0, 1.0])) == pytest.approx([0, 0], abs=1e-7)
