"""p(draft) / max p: how much less probable the target finds the draft token than its own choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from luthier.scorers._spot import Scorer, Spot


@dataclass(frozen=True, kw_only=True)
class Config:
    """The ratio of probabilities has no keys of its own."""


class Prob(Scorer):
    """Costs nothing beyond the target's pass."""

    def score(self, spots: Sequence[Spot]) -> list[float]:
        """p(draft) / max p, both the target's at that place."""
        return [spot.mismatch.prob for spot in spots]
