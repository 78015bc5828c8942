"""Decoding as it would have gone with another rule for mismatches, from recorded rounds alone: no model is needed.

A rule gives every mismatch a number and accepts it if that is at least a threshold. Of a round, the leading positions
are kept that match or are accepted; then the target's own token follows (or the bonus token), so that a pass of the
target brings one token more than what is kept. A round is harmed if a mismatch was accepted that is not good enough.

Each round is taken by itself: a decoder that kept more of it would have gone on elsewhere. And a mismatch that nobody
scored is rejected by every rule, so that where there are such, what is kept is a lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from luthier.evaluate.rounds import Rounds


@dataclass(frozen=True)
class Curve:
    """What a rule keeps and harms as its threshold falls. One entry per threshold at which anything changes, [T].

    The first is infinite: nothing but matches is kept, which is lossless. All three others never fall.
    """

    threshold: np.ndarray
    accepted: np.ndarray
    """Mean number of leading draft tokens that are kept in a round."""
    harm: np.ndarray
    """Share of all rounds that are harmed."""
    mismatches: np.ndarray
    """Accepted mismatches, all rounds together."""
    harmful: np.ndarray
    """How many of these are not good enough."""

    def at(self, threshold: float) -> int:
        """The entry that says what is accepted at a threshold."""
        return int(np.searchsorted(-self.threshold, -threshold, side="right")) - 1

    def within(self, harm: float) -> int:
        """The entry that keeps most without harming more than this share of the rounds."""
        return int(np.searchsorted(self.harm, harm + 1e-12, side="right")) - 1

    def thinned(self, points: int) -> Curve:
        """At most this many entries, the ends among them."""
        count = len(self.threshold)
        kept = np.unique(np.linspace(0, count - 1, min(count, points)).round().astype(np.int64))
        return Curve(*(part[kept] for part in vars(self).values()))


def simulate(rounds: Rounds, score: np.ndarray) -> Curve:
    """The curve of the rule that accepts a mismatch if its score, [M], is at least the threshold.

    A mismatch counts as accepted if it is reached, so if the least score so far in its round is at least the
    threshold: every mismatch has one threshold from which on it is kept, and the curve is a sum over these.
    """
    reached = rounds.reached
    owner, place, bad = rounds.owner[reached], rounds.place[reached], ~rounds.accept[reached]
    values, level = np.unique(score[reached], return_inverse=True)
    level = _least_so_far(level.reshape(-1), owner, len(values))
    first = np.diff(owner, prepend=-1) != 0
    last = np.diff(owner, append=-1) != 0
    free = rounds.length.copy()
    free[owner[first]] = place[first]
    gain = np.where(last, rounds.length[owner], np.append(place[1:], 0)) - place
    worst = np.full(len(rounds.length), -1)
    np.maximum.at(worst, owner[bad], level[bad])

    def summed(levels: np.ndarray, weight: np.ndarray) -> np.ndarray:
        falling = np.bincount(levels, weight, len(values))[::-1]
        return np.append(0.0, falling.cumsum())

    count = summed(level, np.ones(len(level)))
    changes = np.append(True, np.diff(count) > 0)
    return Curve(
        threshold=np.append(np.inf, values[::-1])[changes],
        accepted=(free.sum() + summed(level, gain))[changes] / len(free),
        harm=summed(worst[worst >= 0], np.ones(int((worst >= 0).sum())))[changes] / len(free),
        mismatches=count[changes].astype(np.int64),
        harmful=summed(level, bad)[changes].astype(np.int64),
    )


def _least_so_far(level: np.ndarray, owner: np.ndarray, levels: int) -> np.ndarray:
    """Running minimum of level [M] (0..levels-1) that starts afresh with every round; owner never falls."""
    # Later rounds lie lower by a whole range of levels, so that no earlier minimum reaches into them.
    shift = -owner * levels
    return np.minimum.accumulate(level + shift) - shift
