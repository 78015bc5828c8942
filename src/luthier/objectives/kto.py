"""KTO (Ethayarajh et al. 2024): learns from single answers that somebody liked or disliked.

With r = log p(answer) - log p0(answer), p0 the frozen reference, and s the logistic function, the mean over answers of

    liked       kto_chosen_weight   (1 - s(beta (r - kl)))
    disliked    kto_rejected_weight (1 - s(beta (kl - r)))

kl = max(0, the mean of r over mismatched pairs), held constant: every example's prompt with the answer of the example
after it in the data set. The mean is over the whole optimiser step, so that nothing depends on how a step is cut into
batches, on the number of processes, or on how many workers prepared the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from luthier.core.batch import Batch
from luthier.core.errors import refuse_all
from luthier.core.objective import Objective
from luthier.core.types import ASIDE, Path
from luthier.data.answers import encode_answers, prompt_length
from luthier.data.source import BadRow


@dataclass(frozen=True, kw_only=True)
class KtoConfig:
    """How liked and disliked answers are weighed."""

    kto_chosen_weight: float = 1.0
    """Weight of the answers that were liked."""
    kto_rejected_weight: float = 1.0
    """Weight of the answers that were disliked. With many more of one kind, raise the weight of the other until
    weight x count is about the same."""
    pref_beta: float = 0.1
    """How strongly the policy is held to the reference. In orpo the odds ratio's weight, in simpo the scale."""
    pref_ftx: float = 0.0
    """Weight of an added SFT loss: minus the log-prob per token of the best answer; in kto, of the liked answers."""

    def __post_init__(self) -> None:
        weights = ("kto_chosen_weight", "kto_rejected_weight", "pref_ftx")
        wrong = [f"{w}: {vars(self)[w]} is a weight and must be 0 or more." for w in weights if vars(self)[w] < 0]
        if self.pref_beta <= 0:
            wrong.append(f"pref_beta: {self.pref_beta} must be greater than 0.")
        refuse_all(wrong)


class Kto(Objective):
    """Trains on single answers with a thumb up (score above 0) or down. Metrics have the names TRL gives them."""

    Config = KtoConfig
    encoding_keys = ()
    answers = (1, 1)
    frozen = ("reference",)
    surveys = True

    def encode(self, example, renderer, *, cutoff_len):
        if math.isnan(example.answers[0].score):
            raise BadRow(
                "the answer is neither liked nor disliked", "name the column of true and false: columns: {kto_tag: ...}"
            )
        return encode_answers(example, renderer, cutoff_len=cutoff_len)

    def complete(self, index, examples):
        """Adds the mismatched pair: this prompt, the next example's answer; no longer than the longer of the two."""
        (encoded, name), (after, _) = examples[index], examples[(index + 1) % len(examples)]
        own, other = encoded.paths[0], after.paths[0]
        prompt, reply = own.ids[: prompt_length(own)], other.ids[prompt_length(other) :]
        ids = (prompt + reply)[: max(len(own.ids), len(other.ids))]
        weights = [0.0] * len(prompt) + [1.0] * (len(ids) - len(prompt))
        return replace(encoded, paths=(*encoded.paths, Path(ids, weights, f"{ASIDE}mismatched"))), name

    def survey(self, policy, batch):
        sums = {"liked": (batch.score > 0).sum(), "mismatched": batch.weight.new_zeros(())}
        if batch.aside is None:
            return sums | {"mismatched_ratio": batch.weight.new_zeros(())}
        ratio = _ratio(policy, batch.aside)[1]
        return sums | {"mismatched": torch.tensor(float(len(ratio))), "mismatched_ratio": ratio.double().sum()}

    def loss(self, policy, batch):
        keys, totals = self.config, batch.totals
        assert totals is not None, "the loop surveys a step before its first loss"
        kl = max(totals["mismatched_ratio"] / max(totals["mismatched"], 1.0), 0.0)
        logps, ratio = _ratio(policy, batch)
        liked = batch.score > 0
        if_liked = keys.kto_chosen_weight * (1 - torch.sigmoid(keys.pref_beta * (ratio - kl)))
        if_disliked = keys.kto_rejected_weight * (1 - torch.sigmoid(keys.pref_beta * (kl - ratio)))
        loss = batch.mean(torch.where(liked, if_liked, if_disliked), over="answer")
        logs = {"kl": batch.mean(torch.full_like(ratio, kl), over="answer")}
        reward = keys.pref_beta * ratio.detach()
        for kind, of_kind, count in (
            ("chosen", liked, totals["liked"]),
            ("rejected", ~liked, totals["answer"] - totals["liked"]),
        ):
            logs[f"rewards/{kind}"] = _share(reward, of_kind, count)
            logs[f"logps/{kind}"] = _share(logps.detach(), of_kind, count)
        logs["rewards/margins"] = logs["rewards/chosen"] - logs["rewards/rejected"]
        if keys.pref_ftx:
            lengths = batch.answer.bincount(minlength=batch.answers).clamp(min=1)
            logs["nll_loss"] = _share(-logps / lengths, liked, totals["liked"])
            loss = loss + keys.pref_ftx * logs["nll_loss"]
        return loss, logs

    def record(self, policy, batch):
        logps, ratio = _ratio(policy, batch)
        return {"reward": self.config.pref_beta * ratio, "logp": logps}


def _ratio(policy, batch: Batch) -> tuple[Tensor, Tensor]:
    """(log p, log p - log p0) of each answer, [N] each."""
    logps = policy.logps(batch)
    return batch.per_answer(logps), batch.per_answer(logps - policy.reference(batch).to(logps.dtype))


def _share(values: Tensor, chosen: Tensor, count: float) -> Tensor:
    """This micro-batch's share of the mean over the chosen answers of the whole step, of which there are `count`."""
    return torch.where(chosen, values, 0.0).sum() / max(count, 1.0)
