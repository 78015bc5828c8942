"""exp(-KL / tau): how far the drafter's distribution is from the target's ("Revisiting Judge Decoding", 2601.04766)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from luthier.core.errors import ConfigError
from luthier.scorers._spot import Scorer, Spot


@dataclass(frozen=True, kw_only=True)
class Config:
    """How fast a score falls with the divergence."""

    collect_kl_tau: float = 1.0
    """The divergence, in nats, at which the score has fallen to 10 / e = 3.7 of 10; it is 5 at 0.69 times this."""

    def __post_init__(self) -> None:
        if not 0 < self.collect_kl_tau < math.inf:
            raise ConfigError(f"collect_kl_tau: {self.collect_kl_tau} must be above 0.")


class Kl(Scorer):
    """Costs nothing beyond the target's pass. For drafts without a distribution it is p(draft)^(1 / tau)."""

    config: Config

    def score(self, spots: Sequence[Spot]) -> list[float]:
        """exp(-KL(q || p) / tau)."""
        return [math.exp(-spot.mismatch.kl / self.config.collect_kl_tau) for spot in spots]
