"""Whether pairs that a model gives 70 % are won in 70 % of the cases."""

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
    """Share of the bin that was won."""
    weight: np.ndarray
    """Share of all pairs that lie in the bin; sums to 1."""

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
    share = np.concatenate([weight, weight]) / 2
    place = np.minimum((p * bins).astype(np.int64), bins - 1)
    total = np.bincount(place, share, bins)
    held = total > 0
    total = total[held]
    predicted = np.bincount(place, share * p, bins)[held] / total
    observed = np.bincount(place, share * won, bins)[held] / total
    return Calibration(predicted, observed, total)
