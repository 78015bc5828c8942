"""DiscoRM, a distributional reward model: each answer's reward is a normal distribution (after Thurstone 1927).

The head gives a mean m and a variance v at each answer's last token. For a pair let D = m_better - m_worse,
V = v_better + v_worse and k = 1.702 / t0. The probability that the better answer wins, which `disco_loss` fits:

    probit        P = Phi(D / sqrt(V + t0^2))             rewards and a judge's noise t0 are normal
    expected_bt   P = E sigma(k z), z ~ N(D, V)           the noise is logistic, as in Bradley-Terry
    mackay        P = sigma(k D / sqrt(1 + pi k^2 V / 8)) the same, approximated (MacKay 1992)
    nll_scores    fits 0.5 log(2 pi v) + (score - m)^2 / (2 v) to each answer's score instead; P = Phi(D / sqrt(V))

loss = mean over prompts of the mean over its pairs of -log P
     + disco_prior * mean over prompts of the mean over its answers of KL(N(m, v) || N(0, 1))

With t0 = 0 and no prior the loss does not change when all means and deviations are scaled together, or when a constant
is added to a prompt's means: only D / sqrt(V) is learnt, and variances mean nothing beyond their pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core.batch import Batch
from luthier.core.errors import refuse_all
from luthier.core.kinds import coerce
from luthier.core.objective import Objective
from luthier.data.answers import encode_answers

LOGISTIC = 1.702
"""The normal deviation closest to the standard logistic: |Phi(x / 1.702) - sigma(x)| < 0.0095."""
REACH, NODES = 12.0, 193
"""The trapezoid rule over a standard normal, whose error falls exponentially with the number of nodes: P is right to
1e-6 of itself for k sqrt(V) up to 10."""


@dataclass(frozen=True, kw_only=True)
class DiscoRmConfig:
    """How rewards are distributed and fitted."""

    is_disco: bool | None = None
    """stage: rm with is_disco: true means stage: disco_rm, rewards with a variance."""
    disco_loss: Literal["probit", "expected_bt", "mackay", "nll_scores"] = "probit"
    """What is fitted: pairs, with normal (probit) or logistic noise (expected_bt; mackay approximates it), or each
    answer's score (nll_scores)."""
    disco_noise: float = LOGISTIC
    """Deviation t0 of the judge's own noise. 1.702 gives rewards the scale of an ordinary reward model; 0 (probit only)
    leaves the scale of means and variances open."""
    disco_prior: float = 0.001
    """Weight of KL(N(mean, variance) || N(0, 1)), which holds both in place; 0 for none."""
    disco_floor: float = 1e-4
    """Least variance, above 0 and below 1; it is saved with the head."""
    disco_dropout: float = 0.0
    """Dropout in front of the variance while training."""
    disco_pairs: Literal["all", "best"] = "all"
    """Which pairs of a ranking of more than two answers count: all of them, or the best against each of the others."""

    def __post_init__(self) -> None:
        refuse_all(_contradictions(self))


def _contradictions(keys: DiscoRmConfig) -> Iterator[str]:
    loss, noise = keys.disco_loss, keys.disco_noise
    if keys.is_disco is False:
        yield "is_disco: false contradicts stage: disco_rm. Leave it out, or write stage: rm."
    if noise < 0:
        yield f"disco_noise: {noise} must be 0 or more."
    if noise == 0 and loss in ("expected_bt", "mackay"):
        yield (
            f"disco_noise: 0 leaves nothing of disco_loss: {loss}, whose noise is logistic. "
            "Give it a value above 0, or choose disco_loss: probit."
        )
    if noise != LOGISTIC and loss == "nll_scores":
        yield "disco_noise has no meaning for disco_loss: nll_scores, which compares nothing. Leave it out."
    if keys.disco_prior < 0:
        yield f"disco_prior: {keys.disco_prior} must be 0 or more."
    if not 0 < keys.disco_floor < 1:
        yield f"disco_floor: {keys.disco_floor} must be above 0 and below 1."
    if not 0 <= keys.disco_dropout < 1:
        yield f"disco_dropout: {keys.disco_dropout} must be from 0 to below 1."


def _probit(gap: Tensor, variance: Tensor, noise: float) -> Tensor:
    return torch.special.log_ndtr(gap / (variance + noise**2).sqrt())


def _expected_bt(gap: Tensor, variance: Tensor, noise: float) -> Tensor:
    x = torch.linspace(-REACH, REACH, NODES, dtype=gap.dtype, device=gap.device)
    log_weight = -0.5 * x**2
    draws = gap[..., None] + variance.sqrt()[..., None] * x
    logs = log_weight + F.logsigmoid(LOGISTIC / noise * draws)
    return logs.logsumexp(-1) - log_weight.logsumexp(-1)


def _mackay(gap: Tensor, variance: Tensor, noise: float) -> Tensor:
    k = LOGISTIC / noise
    return F.logsigmoid(k * gap / (1 + math.pi / 8 * k**2 * variance).sqrt())


def _scored(gap: Tensor, variance: Tensor, noise: float) -> Tensor:
    # A score is a draw of the reward itself: there is no judge between them.
    return _probit(gap, variance, 0.0)


LINKS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "probit": _probit,
    "expected_bt": _expected_bt,
    "mackay": _mackay,
    "nll_scores": _scored,
}
"""disco_loss -> log P of a pair."""


def log_preference(gap: Tensor, variance: Tensor, keys: DiscoRmConfig) -> Tensor:
    """log P(the first answer of a pair beats the second); gap: D, variance: V, any one shape."""
    return LINKS[keys.disco_loss](gap, variance, keys.disco_noise)


class DiscoRm(Objective):
    """A reward's mean and variance, read at each answer's last token."""

    Config = DiscoRmConfig
    encoding_keys = ()
    answers = (2, None)
    head = "normal"
    report = "preference"

    @classmethod
    def claims(cls, keys, stage):
        if stage != "rm":
            return False
        try:
            return coerce(bool, keys.get("is_disco", False))
        except ValueError:
            return False  # Stage rm owns the key too, and says what is wrong with it.

    def encode(self, example, renderer, *, cutoff_len):
        return encode_answers(example, renderer, cutoff_len=cutoff_len)

    def loss(self, policy, batch):
        keys = self.config
        mean, variance = policy.verdict(batch).unbind(-1)
        better, worse = batch.pairs(best_only=keys.disco_pairs == "best")
        gap = mean[better] - mean[worse]
        log_p = log_preference(gap, variance[better] + variance[worse], keys)
        measures = {
            "nll": -log_p,
            "brier": (1 - log_p.exp()) ** 2,
            "accuracy": (gap > 0).to(gap.dtype),
            "margin": gap,
            "variance_better": variance[better],
            "variance_worse": variance[worse],
        }
        group = batch.group[better]
        logs = {name: batch.mean(batch.per_group_mean(value, group), over="group") for name, value in measures.items()}
        loss = logs["nll"]
        if keys.disco_loss == "nll_scores":
            loss = logs["score_nll"] = _score_nll(batch, mean, variance)
        divergence = 0.5 * (mean**2 + variance - 1 - variance.log())
        logs["prior"] = batch.mean(batch.per_group_mean(divergence, batch.group), over="group")
        # Also without answers or with a weight of 0 every parameter of the head belongs to the graph.
        return loss + keys.disco_prior * logs["prior"] + (mean.sum() + variance.sum()) * 0, logs

    def record(self, policy, batch):
        mean, variance = policy.verdict(batch).unbind(-1)
        return {"mean": mean, "variance": variance}


def _score_nll(batch: Batch, mean: Tensor, variance: Tensor) -> Tensor:
    """-log N(score; mean, variance), the mean over prompts of the mean over their scored answers."""
    scored = (~batch.score.isnan()).nonzero()[:, 0]
    m, v = mean[scored], variance[scored]
    nll = 0.5 * ((2 * math.pi * v).log() + (batch.score[scored].to(m.dtype) - m) ** 2 / v)
    return batch.mean(batch.per_group_mean(nll, batch.group[scored]), over="group")
