"""How well probabilities agree with soft scores of 0 to 1, of which one half and more means accept."""

from __future__ import annotations

import numpy as np

from luthier.evaluate.calibration import Calibration, reliability
from luthier.evaluate.ranking import Ranking, spearman
from luthier.evaluate.rounds import GOOD_ENOUGH

BINS = 15
TOLERANCES = (0.1, 0.2)
FALSE_ALARMS = (5, 10)
"""Shares, in percent, of the acceptable mismatches that may be rejected by mistake where rejects are found."""
TINY, LAST = float(np.finfo(np.float32).tiny), 1 - 2.0**-25
"""A probability in float32 is rounded to 0 or 1 beyond these."""


def measures(target: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    """All measures that are defined; target, probability [M] in 0..1.

    base_rate     share with target >= 1/2 (accept)
    roc_auc       P(an acceptable one has the higher probability than another one)
    pr_auc        average precision of accept; chance is base_rate
    spearman      rank correlation of probability and target
    mae, mse, rmse  of the probability as an estimate of the target
    tolerance_T   share with |p - y| <= T y where y >= 0.01, else |p - y| <= T
    brier         mean (p - accept)^2;  ece: against accept, in 15 bins of equal width;  ece_score: against the target
    bce           -y ln p - (1 - y) ln(1 - p);  excess_bce: without the entropy of y, below which it cannot fall
    reject_recall_at_F  largest share of the rejects found at a false alarm rate of F %
    """
    error = np.abs(probability - target)
    accept = target >= GOOD_ENOUGH
    ranking = Ranking(probability, accept)
    found = {"base_rate": float(accept.mean())}
    if ranking.defined:
        found["roc_auc"] = ranking.roc().auc
    if accept.any():
        found["pr_auc"] = ranking.average_precision()
    correlation = spearman(probability, target)
    if correlation is not None:
        found["spearman"] = correlation
    mse = float((error**2).mean())
    found |= {"mae": float(error.mean()), "mse": mse, "rmse": mse**0.5}
    found |= {f"tolerance_{limit}": float(within(target, probability, limit).mean()) for limit in TOLERANCES}
    found["brier"] = float(((probability - accept) ** 2).mean())
    found["ece"] = calibrated(probability, accept).ece
    found["ece_score"] = calibrated(probability, target).ece
    bce = cross_entropy(target, probability)
    found |= {"bce": float(bce.mean()), "excess_bce": float((bce - cross_entropy(target, target)).mean())}
    if ranking.defined:
        rejects = Ranking(-probability, ~accept).roc()
        found |= {f"reject_recall_at_{share}": rejects.recall_at(share / 100) for share in FALSE_ALARMS}
    return found


def within(target: np.ndarray, probability: np.ndarray, limit: float) -> np.ndarray:
    """bool [M]: the tolerance of AcceptHead's origin, relative to the target unless that is almost 0."""
    return np.abs(probability - target) <= limit * np.where(target >= 0.01, target, 1.0)


def calibrated(probability: np.ndarray, came_true: np.ndarray) -> Calibration:
    """The reliability diagram of probabilities [M]; came_true [M] in 0..1."""
    return reliability(probability, came_true, np.full(len(probability), 1 / len(probability)), BINS)


def cross_entropy(target: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """-y ln p - (1 - y) ln(1 - p), [M]; of (y, y) it is the entropy."""
    p = np.clip(probability, TINY, LAST)
    return -(target * np.log(p) + (1 - target) * np.log1p(-p))
