"""Whether a model knows what it does not know: its errors among the pairs it is surest of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RiskCoverage:
    """The error rate among the pairs kept, from the surest few to all; a step at every distinct uncertainty."""

    coverage: np.ndarray
    """Share of the pairs that are kept; increasing, ends at 1."""
    risk: np.ndarray
    """Share of the kept pairs that are wrong."""

    @property
    def aurc(self) -> float:
        """Area under the curve as a staircase: mean risk over all shares kept. 0 is best; the error rate is chance."""
        return float(self.risk @ np.diff(self.coverage, prepend=0.0))


def risk_coverage(uncertainty: np.ndarray, wrong: np.ndarray, weight: np.ndarray) -> RiskCoverage:
    """Keep pairs in order of their uncertainty, [P]; wrong [P] 0/1, weight [P] sums to 1.

    Pairs that are equally uncertain come in together, so that their order in the data does not matter.
    """
    _, place = np.unique(uncertainty, return_inverse=True)
    place = place.reshape(-1)
    kept = np.bincount(place, weight).cumsum()
    missed = np.bincount(place, weight * wrong).cumsum()
    return RiskCoverage(kept / kept[-1], missed / kept)


@dataclass(frozen=True)
class Deciles:
    """Pairs in ten groups of one size (to within one), from the lowest variance to the highest."""

    variance: np.ndarray
    """Mean variance of each group."""
    accuracy: np.ndarray
    count: np.ndarray
    """Pairs in each group."""


def by_variance(variance: np.ndarray, right: np.ndarray, weight: np.ndarray, groups: int = 10) -> Deciles:
    """Accuracy by decile of variance; variance, right (0/1) and weight are [P]. Few pairs make fewer groups."""
    order = np.argsort(variance, kind="stable")
    parts = np.array_split(order, min(groups, len(order)))
    return Deciles(
        np.array([np.average(variance[part], weights=weight[part]) for part in parts]),
        np.array([np.average(right[part], weights=weight[part]) for part in parts]),
        np.array([len(part) for part in parts]),
    )
