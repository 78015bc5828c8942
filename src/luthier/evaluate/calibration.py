"""Whether what a model gives 70 % comes true in 70 % of the cases."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 20


@dataclass(frozen=True)
class Calibration:
    """A reliability diagram: arrays of one entry per bin that holds anything, from P = 0 to 1."""

    predicted: np.ndarray
    """Mean probability in the bin."""
    observed: np.ndarray
    """Share of the bin that was won, or the mean of what came of it."""
    weight: np.ndarray
    """Share of everything that lies in the bin; sums to 1."""

    @property
    def ece(self) -> float:
        """Expected calibration error: mean |predicted - observed|, by weight."""
        return float(self.weight @ np.abs(self.predicted - self.observed))

    @property
    def mce(self) -> float:
        """The largest |predicted - observed|."""
        return float(np.abs(self.predicted - self.observed).max())


def calibrate(probability: np.ndarray, weight: np.ndarray, bins: int = BINS) -> Calibration:
    """Bin P(the better answer wins), [P] in 0..1; weight [P] sums to 1.

    Every pair's first answer is the better one, so each pair counts a second time the other way round, as (1 - P,
    lost): else a model that always says 1 would look calibrated only where it is right.
    """
    p = np.concatenate([probability, 1 - probability])
    won = np.concatenate([np.ones_like(probability), np.zeros_like(probability)])
    return reliability(p, won, np.concatenate([weight, weight]) / 2, bins)


def reliability(predicted: np.ndarray, observed: np.ndarray, weight: np.ndarray, bins: int = BINS) -> Calibration:
    """Bins of equal width over what was predicted, 0..1; observed: what came of it, 0..1; weight sums to 1. All [N]."""
    place = np.minimum((predicted * bins).astype(np.int64), bins - 1)
    total = np.bincount(place, weight, bins)
    held = total > 0
    total = total[held]
    mean = np.bincount(place, weight * predicted, bins)[held] / total
    return Calibration(mean, np.bincount(place, weight * observed, bins)[held] / total, total)
