"""How well scores put what should be accepted above what should not: ROC, precision and recall, rank correlation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Roc:
    """Rates as the threshold falls, from nothing accepted to everything; equal scores come in together."""

    fpr: np.ndarray
    """Share of the negatives that are accepted; from 0 to 1."""
    tpr: np.ndarray
    """Share of the positives that are accepted; from 0 to 1."""

    @property
    def auc(self) -> float:
        """P(a positive has the higher score than a negative), a tie counting half."""
        return float(np.diff(self.fpr) @ (self.tpr[1:] + self.tpr[:-1]) / 2)

    def recall_at(self, fpr: float) -> float:
        """The largest share of the positives at no more than this share of the negatives."""
        return float(self.tpr[np.searchsorted(self.fpr, fpr + 1e-12, side="right") - 1])


class Ranking:
    """Scores [N] and which of them are positive, bool [N], sorted once."""

    def __init__(self, score: np.ndarray, positive: np.ndarray):
        values, place = np.unique(-score, return_inverse=True)
        self.place, self.size, self.positive = place.reshape(-1), len(values), positive

    @property
    def defined(self) -> bool:
        """Whether there are positives and negatives to tell apart."""
        return bool(self.positive.any() and not self.positive.all())

    def counts(self, weight: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(true, false) positives at each distinct threshold, highest first; weight [N]: how often an entry counts."""
        weight = np.ones(len(self.place)) if weight is None else weight
        hits = np.bincount(self.place, weight * self.positive, self.size).cumsum()
        return hits, np.bincount(self.place, weight * ~self.positive, self.size).cumsum()

    def roc(self, weight: np.ndarray | None = None) -> Roc:
        """The curve; defined only if there are positives and negatives."""
        hits, misses = self.counts(weight)
        return Roc(np.append(0.0, misses / misses[-1]), np.append(0.0, hits / hits[-1]))

    def average_precision(self) -> float:
        """sum over thresholds of (recall - recall before) x precision: the area under the staircase."""
        hits, misses = self.counts()
        return float(np.diff(hits, prepend=0.0) / hits[-1] @ (hits / (hits + misses)))


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation, ties with their mean rank; None where one of the two never changes."""
    x, y = (_mean_ranks(values) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else None


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[place.reshape(-1)]


def auc_spread(
    rankings: dict[str, Ranking], cluster: np.ndarray, clusters: int, *, draws: int, seed: int
) -> dict[str, np.ndarray]:
    """AUCs [draws] of several scores of the same entries, over draws of whole clusters with replacement (bootstrap).

    cluster: int64 [N], 0..clusters-1. All scores see the same draws, so that differences can be taken; draws that leave
    one kind only are left out.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {name: [] for name in rankings}
    positive = next(iter(rankings.values())).positive
    for _ in range(draws):
        weight = rng.multinomial(clusters, np.full(clusters, 1 / clusters))[cluster].astype(np.float64)
        if weight[positive].any() and weight[~positive].any():
            for name, ranking in rankings.items():
                found[name].append(ranking.roc(weight).auc)
    return {name: np.array(values) for name, values in found.items()}
