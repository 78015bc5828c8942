"""Reward model: the better answer of a pair gets the higher score (Bradley-Terry; Ouyang et al. 2022).

loss = mean over prompts of the mean over its pairs of
       -log sigma(r_better - r_worse - rm_margin (score_better - score_worse)) + rm_center (r_better + r_worse)^2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F

from luthier.core.errors import refuse_all
from luthier.core.objective import Objective
from luthier.data.answers import encode_answers


@dataclass(frozen=True, kw_only=True)
class RmConfig:
    """How answers are compared."""

    is_disco: bool | None = None
    """stage: rm with is_disco: true means stage: disco_rm, rewards with a variance."""
    rm_margin: float = 0.0
    """Margin added for each unit of difference between the answers' scores (Llama 2's margin); 0 for none."""
    rm_center: float = 0.0
    """Weight of (r_better + r_worse)^2, which keeps rewards centred at zero (Eisenstein et al. 2023)."""
    rm_pairs: Literal["all", "best"] = "all"
    """Which pairs of a ranking of more than two answers count: all of them, or the best against each of the others."""

    def __post_init__(self) -> None:
        weights = {"rm_margin": self.rm_margin, "rm_center": self.rm_center}
        refuse_all(f"{key}: {value} must be 0 or more." for key, value in weights.items() if value < 0)


class Rm(Objective):
    """A scalar reward read at each answer's last token."""

    Config = RmConfig
    encoding_keys = ()
    answers = (2, None)
    head = "value"
    report = "preference"

    def encode(self, example, renderer, *, cutoff_len):
        return encode_answers(example, renderer, cutoff_len=cutoff_len)

    def loss(self, policy, batch):
        reward = policy.verdict(batch)[:, 0]
        better, worse = batch.pairs(best_only=self.config.rm_pairs == "best")
        gap = reward[better] - reward[worse]
        group = batch.group[better]
        margin = self.config.rm_margin * (batch.score[better] - batch.score[worse]).to(gap.dtype)
        loss = -F.logsigmoid(gap - margin) + self.config.rm_center * (reward[better] + reward[worse]) ** 2
        measures = {"loss": loss, "accuracy": (gap > 0).to(gap.dtype), "margin": gap}
        means = {name: batch.mean(batch.per_group_mean(value, group), over="group") for name, value in measures.items()}
        means["reward"] = batch.mean(reward, over="answer")
        # A batch without answers still passes through the head, so that every rank's parameters have gradients.
        return means.pop("loss") + reward.sum() * 0, means

    def record(self, policy, batch):
        return {"reward": policy.verdict(batch)[:, 0]}
