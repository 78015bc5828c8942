"""Tuna: maximum likelihood with a margin ranking loss (Li et al., EMNLP Findings 2023, arXiv 2310.13385).

Answers of a prompt at ranks 0 (best), 1, 2 ..., s_i the mean log-prob of the tokens of answer i:

    loss = mle_weight * cross-entropy
         + mean over prompts of  sum_d  mean over its pairs d ranks apart of  max(0, s_worse - s_better + d margin)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from luthier.core.batch import Batch
from luthier.core.errors import refuse_all
from luthier.core.objective import Objective
from luthier.data.answers import encode_answers
from luthier.objectives._ranks import best_tokens, mean_logps, mean_over_best, measures, per_group, ranks, record


@dataclass(frozen=True, kw_only=True)
class TunaConfig:
    """How far apart answers should be, and which of them are imitated."""

    tuna_margin: float = 0.1
    """How much higher the log-prob of the better answer should be, per rank between the two."""
    tuna_mle_weight: float = 1.0
    """Weight of the cross-entropy."""
    tuna_norm: Literal["mean", "sum"] = "mean"
    """Log-prob of an answer: the mean over its tokens, or their sum."""
    tuna_reduction: Literal["sum", "mean"] = "sum"
    """The losses at the rank distances 1, 2 ... of a list are summed, or averaged."""
    mle_on: Literal["all", "best"] = "all"
    """Which answers the cross-entropy trains: all, bad ones too, as in the authors' code; or each list's best."""

    def __post_init__(self) -> None:
        weights = {"tuna_margin": self.tuna_margin, "tuna_mle_weight": self.tuna_mle_weight}
        refuse_all(f"{key}: {value} must be 0 or more." for key, value in weights.items() if not value >= 0)


class Tuna(Objective):
    """Imitates answers and orders them by rank."""

    Config = TunaConfig
    encoding_keys = ()
    answers = (2, None)
    surveys = True

    def encode(self, example, renderer, *, cutoff_len):
        return encode_answers(example, renderer, cutoff_len=cutoff_len)

    def survey(self, policy, batch):
        return best_tokens(batch)

    def loss(self, policy, batch):
        logps, nll = policy.logps(batch), policy.nll(batch)
        where, logp = ranks(batch), mean_logps(batch, logps)
        value = logp if self.config.tuna_norm == "mean" else batch.per_answer(logps)
        ranking = batch.mean(self._hinges(batch, where.level, value), over="group")
        best_only = self.config.mle_on == "best"
        mle = mean_over_best(batch, where, nll) if best_only else batch.mean(nll, over="token")
        logs = {"mle_loss": mle, "ranking_loss": ranking, **measures(batch, where, logp)}
        return self.config.tuna_mle_weight * mle + ranking, logs

    def record(self, policy, batch):
        return record(policy, batch)

    def _hinges(self, batch: Batch, level: Tensor, value: Tensor) -> Tensor:
        """The ranking loss of each group, [G]: its pairs by how many ranks they are apart.

        Equal scores share a rank, so that the order in which they came means nothing.
        """
        better, worse = batch.pairs()
        apart = level[worse] - level[better]
        hinge = (value[worse] - value[better] + self.config.tuna_margin * apart.to(value.dtype)).clamp(min=0)
        # Pairs of one group at one distance are averaged: each such set is a cell of a [G, N] table.
        cell = batch.group[better] * batch.answers + apart
        members = hinge.new_zeros(len(batch.names) * batch.answers).index_add(0, cell, hinge.new_ones(len(hinge)))
        summed = per_group(batch, hinge / members[cell], batch.group[better])
        if self.config.tuna_reduction == "sum":
            return summed
        distances = level.new_zeros(len(batch.names)).scatter_reduce(0, batch.group, level, "amax")
        return summed / distances.clamp(min=1)
