"""AUC, average precision, Spearman and recall against definitions written as loops, and scipy."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy import stats

from luthier.evaluate.ranking import Ranking, auc_spread, spearman


def sample(seed, size=40, values=9):
    """Scores with ties, and labels that go with them loosely."""
    rng = np.random.default_rng(seed)
    score = rng.integers(values, size=size) / values
    positive = rng.random(size) < 0.2 + 0.6 * score
    positive[:2] = True, False
    return score, positive


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_pairs_in_order(seed):
    score, positive = sample(seed)
    pairs = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    assert Ranking(score, positive).roc().auc == pytest.approx(np.mean(pairs))
    u = stats.mannwhitneyu(score[positive], score[~positive]).statistic
    assert Ranking(score, positive).roc().auc == pytest.approx(u / (positive.sum() * (~positive).sum()))


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_and_recall_by_thresholds(seed):
    score, positive = sample(seed)
    before, area, points = 0.0, 0.0, [(0.0, 0.0)]
    for threshold in sorted(set(score.tolist()), reverse=True):
        said = score >= threshold
        hits = sum(said & positive)
        recall = hits / sum(positive)
        area += (recall - before) * hits / sum(said)
        before = recall
        points.append((sum(said & ~positive) / sum(~positive), recall))
    ranking = Ranking(score, positive)
    assert ranking.average_precision() == pytest.approx(area)
    for limit in (0.0, 0.05, 0.1, 0.37, 1.0):
        assert ranking.roc().recall_at(limit) == pytest.approx(max(r for f, r in points if f <= limit))


def test_a_limit_that_is_met_exactly_counts():
    """20 negatives, one of them above the second positive: 1 / 20 is 5 %."""
    score = np.array([0.9, 0.8, 0.7, *np.linspace(0.1, 0.2, 19)])
    positive = np.array([True, False, True, *[False] * 19])
    assert Ranking(score, positive).roc().recall_at(0.05) == 1.0
    assert Ranking(score, positive).roc().recall_at(0.04) == 0.5


@pytest.mark.parametrize("seed", range(3))
def test_weights_count_entries_again(seed):
    score, positive = sample(seed)
    weight = np.random.default_rng(seed).integers(0, 4, size=len(score))
    again = np.repeat(np.arange(len(score)), weight)
    expected = Ranking(score[again], positive[again]).roc().auc
    assert Ranking(score, positive).roc(weight.astype(float)).auc == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_spearman_is_scipys(seed):
    rng = random.Random(seed)
    a = np.array([rng.randint(0, 6) for _ in range(30)], float)
    b = a + np.array([rng.randint(0, 6) for _ in range(30)])
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


def test_spearman_of_what_never_changes_is_not_defined():
    assert spearman(np.ones(4), np.arange(4.0)) is None


def test_the_spread_is_that_of_drawing_clusters():
    """Against a bootstrap that copies the rows of the drawn clusters; both score columns see the same draws."""
    rng = np.random.default_rng(1)
    cluster = np.repeat(np.arange(12), 10)
    positive = rng.random(120) < 0.5
    good, poor = positive + rng.normal(size=120), positive * 0.3 + rng.normal(size=120)
    rankings = {"good": Ranking(good, positive), "poor": Ranking(poor, positive), "same": Ranking(good * 2, positive)}
    found = auc_spread(rankings, cluster, 12, draws=400, seed=3)
    copies = []
    for _ in range(400):
        rows = np.concatenate([np.flatnonzero(cluster == c) for c in rng.integers(12, size=12)])
        copies.append(Ranking(good[rows], positive[rows]).roc().auc)
    assert found["good"].mean() == pytest.approx(np.mean(copies), abs=0.01)
    assert found["good"].std() == pytest.approx(np.std(copies), rel=0.2)
    assert (found["good"] == found["same"]).all() and (found["good"] > found["poor"]).mean() > 0.9


def test_draws_of_one_kind_only_are_left_out():
    ranking = Ranking(np.array([0.9, 0.1]), np.array([True, False]))
    found = auc_spread({"head": ranking}, np.array([0, 1]), 2, draws=50, seed=0)["head"]
    assert 0 < len(found) < 50 and (found == 1).all()
