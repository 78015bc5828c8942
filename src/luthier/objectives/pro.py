"""Preference ranking optimisation (Song et al., AAAI 2024, arXiv 2306.17492), as its authors' code computes it.

Answers 0 .. n-1 from best to worst, s_i the mean log-prob of the tokens of answer i, r_i its score:

    loss = mean over prompts of
             sum_k -log [ exp(T_k s_k) / (exp(T_k s_k) + sum_{i worse than k} exp(T_ki s_i)) ]
             + sft_weight (n - 1)^2 (-log p(answer 0))
    T_ki = scale (r_k - r_i),    T_k = max_i T_ki
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from luthier.core.batch import Batch
from luthier.core.errors import refuse_all
from luthier.core.objective import Objective
from luthier.data.answers import encode_answers
from luthier.objectives._ranks import best_tokens, mean_logps, mean_over_best, measures, per_group, ranks, record


@dataclass(frozen=True, kw_only=True)
class ProConfig:
    """How many candidates are ranked, how sharply, and how much the best is imitated."""

    pro_stage: int | None = None
    """How many of the best candidates are ranked, 2 or more; unset: all of each list."""
    pro_schedule: Literal["fixed", "curriculum"] = "fixed"
    """fixed: the same number of candidates throughout; curriculum: equal parts of the training rank 1, 2 ... up to
    that number of them, where 1 is supervised fine-tuning on the best."""
    pro_sft_weight: float = 0.05
    """Weight of imitating the best candidate (its summed log-prob); times (candidates - 1)^2 as in the authors'
    code."""
    reward_scale: float = 1.0
    """Factor on differences of scores, which are the inverse temperatures of the ranking: larger is sharper."""

    def __post_init__(self) -> None:
        refuse_all(_complaints(self))


def _complaints(keys: ProConfig) -> Iterator[str]:
    if keys.pro_stage is not None and keys.pro_stage < 2:
        yield (
            f"pro_stage: {keys.pro_stage} ranks nothing; give 2 or more candidates. To train on the best alone "
            "first, set pro_schedule: curriculum."
        )
    if not keys.pro_sft_weight >= 0:
        yield f"pro_sft_weight: {keys.pro_sft_weight} must be 0 or more."
    if not keys.reward_scale > 0:
        yield f"reward_scale: {keys.reward_scale} must be above 0: a score is better the higher it is."


class Pro(Objective):
    """Ranks K answers: each of them against all that are worse."""

    Config = ProConfig
    encoding_keys = ()
    answers = (2, None)
    surveys = True

    def encode(self, example, renderer, *, cutoff_len):
        return encode_answers(example, renderer, cutoff_len=cutoff_len)

    def survey(self, policy, batch):
        return best_tokens(batch)

    def loss(self, policy, batch):
        where, nll = ranks(batch), policy.nll(batch)
        logp, stage = mean_logps(batch, policy.logps(batch)), self._stage(batch, where.size)
        better, worse = batch.pairs()
        ranked = where.rank[worse] < stage[batch.group[worse]]
        terms = listwise(logp, self.config.reward_scale * batch.score, better[ranked], worse[ranked])
        best = where.best.nonzero()[:, 0]
        said = (stage - 1) ** 2 * per_group(batch, batch.per_answer(nll)[best], batch.group[best])
        # A list of which only the best is trained has nothing to rank: plain SFT, the mean over tokens.
        alone = nll * (stage == 1)[batch.group[batch.answer]]
        ranking = batch.mean(per_group(batch, terms, batch.group), over="group")
        imitation = self.config.pro_sft_weight * batch.mean(said, over="group") + mean_over_best(batch, where, alone)
        logs = {"ranking_loss": ranking, "sft_loss": imitation, **measures(batch, where, logp)}
        if self.config.pro_schedule == "curriculum":
            logs["stage"] = batch.mean(stage.to(logp.dtype), over="group")
        return ranking + imitation, logs

    def record(self, policy, batch):
        return record(policy, batch)

    def _stage(self, batch: Batch, size: Tensor) -> Tensor:
        """How many candidates of each group are ranked now, int64 [G].

        Decided by the group alone, never by its company: how a step is cut into micro-batches must not matter.
        """
        stage = size if self.config.pro_stage is None else torch.full_like(size, self.config.pro_stage)
        if self.config.pro_schedule == "curriculum":
            # The hair above keeps a third of the training from being 0.99.. of a third.
            reached = 1 + (stage.double() * (batch.progress + 1e-9)).floor().to(stage.dtype)
            stage = torch.minimum(stage, reached)
        return torch.minimum(stage, size)


def listwise(logp: Tensor, score: Tensor, better: Tensor, worse: Tensor) -> Tensor:
    """-log of each answer's share against those worse than it, [N]; 0 where none is.

    logp, score: [N]; better, worse: [P], the pairs that are compared. The authors' code sums exponentials and adds
    1e-10, which for unlikely answers is all that is left of the sum; here the largest exponent is taken out first.
    Answers of equal score are no pair: there, the one that comes first would compete with exp(0).
    """
    gap = (score[better] - score[worse]).to(logp.dtype)
    sharpest = torch.zeros_like(logp).scatter_reduce(0, better, gap, "amax")
    exponent = logp[worse] * gap - (logp * sharpest)[better]
    largest = torch.zeros_like(logp).scatter_reduce(0, better, exponent.detach(), "amax")
    total = (-largest).exp().index_add(0, better, (exponent - largest[better]).exp())
    return largest + total.log()
