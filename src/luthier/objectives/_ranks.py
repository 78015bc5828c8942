"""What the ranking stages share: where answers stand in their list, their log-probs, and what is measured of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.core.batch import Batch
from luthier.core.objective import Policy

BEST_TOKEN = "best_token"
"""Unit of means over the supervised tokens of each list's best answer; counted by `best_tokens`."""


@dataclass(frozen=True)
class Ranks:
    """Where each of the N answers stands among the answers of its group."""

    rank: Tensor
    """int64 [N]: 0 for the best, then 1, 2 ...; answers with equal scores in the order they came."""
    level: Tensor
    """int64 [N]: how many different scores are higher; equal scores share a level."""
    size: Tensor
    """int64 [G]: answers of each group."""

    @property
    def best(self) -> Tensor:
        """bool [N]: the one best answer of each group."""
        return self.rank == 0


def ranks(batch: Batch) -> Ranks:
    """Where every answer of a batch stands."""
    group, score = batch.group, batch.score
    index = torch.arange(batch.answers, device=score.device)
    same = group[:, None] == group[None, :]
    higher = same & (score[None, :] > score[:, None])
    before = same & (score[None, :] == score[:, None]) & (index[None, :] < index[:, None])
    first_of_level = ~before.any(1)
    size = torch.zeros(len(batch.names), dtype=torch.int64, device=group.device)
    return Ranks(
        rank=(higher | before).sum(1),
        level=(higher & first_of_level[None, :]).sum(1),
        size=size.index_add(0, group, torch.ones_like(group)),
    )


def mean_logps(batch: Batch, logps: Tensor) -> Tensor:
    """Mean log-prob of the tokens of each answer, [N], from those of the tokens, [E]."""
    return batch.per_answer(logps) / batch.per_answer(torch.ones_like(logps)).clamp(min=1)


def per_group(batch: Batch, values: Tensor, group: Tensor) -> Tensor:
    """Sum of values [X] in each group, [G]; `group` [X] says where each belongs."""
    return values.new_zeros(len(batch.names)).index_add(0, group, values)


def best_tokens(batch: Batch) -> dict[str, Tensor]:
    """How many supervised tokens the best answers have: what a `survey` sums up for `mean_over_best`."""
    return {BEST_TOKEN: (batch.weight * ranks(batch).best[batch.answer]).sum()}


def mean_over_best(batch: Batch, where: Ranks, values: Tensor) -> Tensor:
    """This micro-batch's share of the mean over the tokens of all best answers; `values` [E] count nowhere else."""
    chosen = batch.weight * where.best[batch.answer]
    if batch.totals is None:
        batch = batch.with_totals({BEST_TOKEN: float(chosen.sum())})
    return batch.mean(values * chosen.to(values.dtype), over=BEST_TOKEN)


def measures(batch: Batch, where: Ranks, logp: Tensor) -> dict[str, Tensor]:
    """How well the mean log-probs [N] order the answers: means over the groups.

    ranking_accuracy: share of the pairs with different scores that are in order. best_first: whether an answer with
    the highest score is above all others. best_logp: mean log-prob of the best answer's tokens.
    """
    logp = logp.detach()
    better, worse = batch.pairs()
    in_order = (logp[better] > logp[worse]).to(logp.dtype)
    best = where.best.nonzero()[:, 0]
    return {
        "ranking_accuracy": batch.mean(batch.per_group_mean(in_order, batch.group[better]), over="group"),
        "best_first": batch.mean(_best_first(batch, where, logp), over="group"),
        "best_logp": batch.mean(per_group(batch, logp[best], batch.group[best]), over="group"),
    }


def _best_first(batch: Batch, where: Ranks, logp: Tensor) -> Tensor:
    lowest = torch.full((len(batch.names),), -torch.inf, dtype=logp.dtype, device=logp.device)
    top, rest = (
        lowest.scatter_reduce(0, batch.group[chosen], logp[chosen], "amax")
        for chosen in (where.level == 0, where.level > 0)
    )
    return (top > rest).to(logp.dtype)


def record(policy: Policy, batch: Batch) -> Mapping[str, Tensor]:
    """What predictions hold: log-prob of each answer, and per token."""
    logps = policy.logps(batch)
    return {"logp": batch.per_answer(logps), "mean_logp": mean_logps(batch, logps)}
