"""Direct preference optimisation and its family: the chosen answer becomes more likely than the rejected one.

With A, B the log-probs of the better and the worse answer of a pair, A0, B0 those under the frozen reference, a, b and
a0, b0 the same per token, and h = (A - A0) - (B - B0), the mean over prompts of the mean over a prompt's pairs of:

    sigmoid    -(1 - e) log s(beta h) - e log s(-beta h)                   Rafailov et al. 2023 (e > 0: cDPO)
    hinge      max(0, 1 - beta h)                                          Zhao et al. 2023 (SLiC)
    ipo        (((a - a0) - (b - b0)) - 1 / (2 beta))^2                    Azar et al. 2023, per token as its authors do
    kto_pair   (1 - s(beta (A - A0 - KL_B)) + 1 - s(beta (KL_A - B + B0))) / 2      Ethayarajh et al. 2024, eq. 7
    robust     (-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2 e)     Chowdhury et al. 2024
    exo_pair   KL(softmax(beta A - beta A0, beta B - beta B0) || (1 - e, e))        Ji et al. 2024, eq. 16
    orpo       -a - beta log s(log odds(a) - log odds(b))                  Hong et al. 2024; no reference
    simpo      -log s(beta (a - b) - gamma)                                Meng et al. 2024; no reference
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core.batch import Batch
from luthier.core.errors import refuse_all
from luthier.core.objective import Objective
from luthier.data.answers import encode_answers


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """How pairs of answers are compared."""

    pref_loss: Literal["sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo", "robust", "exo_pair"] = "sigmoid"
    """The loss of a pair. orpo and simpo need no reference model; ipo, orpo and simpo count log-probs per token."""
    pref_beta: float = 0.1
    """How strongly the policy is held to the reference. In orpo the odds ratio's weight, in simpo the scale."""
    pref_ftx: float = 0.0
    """Weight of an added SFT loss: minus the log-prob per token of the best answer; in kto, of the liked answers."""
    pref_bco_weight: float = 0.0
    """Weight w of the binary classifier loss (Jung et al. 2024) in (preference + w bco) / (1 + w). Its reward shift is
    the mean reward of the whole optimiser step, found by a forward pass of its own."""
    dpo_label_smoothing: float = 0.0
    """Share of pairs whose labels are taken to be wrong, from 0 to below 0.5; for sigmoid, robust and exo_pair."""
    simpo_gamma: float = 0.5
    """Margin that simpo asks of the better answer."""
    ld_alpha: float | None = None
    """Weight of an answer's tokens beyond the length of the shorter of the pair (LD-DPO, Liu et al. 2024), from 0 to
    1, for the policy and the reference alike. Unset: all tokens count the same."""
    dpo_pairs: Literal["best", "all"] = "best"
    """Which pairs of a ranking of more than two answers count: the best against each of the others, or all of them."""

    def __post_init__(self) -> None:
        refuse_all(_complaints(self, KINDS[self.pref_loss]))


@dataclass(frozen=True)
class Step:
    """Means over the whole optimiser step; zeros for losses that do not ask for them."""

    better: Tensor
    """Mean of A - A0, what kto_pair calls its KL of the chosen answers."""
    worse: Tensor
    """Mean of B - B0."""
    reward: Tensor
    """Mean reward of all answers in pairs, beta (A - A0) and beta (B - B0) alike."""


PairLoss = Callable[[Tensor, Tensor, DpoConfig, Step], Tensor]
"""(scores of the better answers [P], of the worse [P], keys, step) -> losses [P]. Scores are log-ratios to the
reference, or log-probs where there is none; per token for the losses that are `averaged`."""


def _sigmoid(better: Tensor, worse: Tensor, keys: DpoConfig, step: Step) -> Tensor:
    h, e = keys.pref_beta * (better - worse), keys.dpo_label_smoothing
    return -(1 - e) * F.logsigmoid(h) - e * F.logsigmoid(-h)


def _hinge(better: Tensor, worse: Tensor, keys: DpoConfig, step: Step) -> Tensor:
    return torch.relu(1 - keys.pref_beta * (better - worse))


def _ipo(better: Tensor, worse: Tensor, keys: DpoConfig, step: Step) -> Tensor:
    return (better - worse - 1 / (2 * keys.pref_beta)) ** 2


def _kto_pair(better: Tensor, worse: Tensor, keys: DpoConfig, step: Step) -> Tensor:
    liked = torch.sigmoid(keys.pref_beta * (better - step.worse.clamp(min=0)))
    disliked = torch.sigmoid(keys.pref_beta * (step.better.clamp(min=0) - worse))
    return 1 - (liked + disliked) / 2


def _robust(better: Tensor, worse: Tensor, keys: DpoConfig, step: Step) -> Tensor:
    h, e = keys.pref_beta * (better - worse), keys.dpo_label_smoothing
    return (-(1 - e) * F.logsigmoid(h) + e * F.logsigmoid(-h)) / (1 - 2 * e)


def _exo_pair(better: Tensor, worse: Tensor, keys: DpoConfig, step: Step) -> Tensor:
    h = keys.pref_beta * (better - worse)
    e = torch.tensor(keys.dpo_label_smoothing, dtype=h.dtype, device=h.device)
    return h.sigmoid() * (F.logsigmoid(h) - torch.log1p(-e)) + (-h).sigmoid() * (F.logsigmoid(-h) - e.log())


def _orpo(better: Tensor, worse: Tensor, keys: DpoConfig, step: Step) -> Tensor:
    return -keys.pref_beta * F.logsigmoid(_log_odds(better) - _log_odds(worse))


def _simpo(better: Tensor, worse: Tensor, keys: DpoConfig, step: Step) -> Tensor:
    return -F.logsigmoid(keys.pref_beta * (better - worse) - keys.simpo_gamma)


def _log_odds(logp: Tensor) -> Tensor:
    # A certain answer has infinite odds, and the gradient of a certain token is not worth a NaN.
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


@dataclass(frozen=True)
class Kind:
    """What a `pref_loss` is."""

    loss: PairLoss
    averaged: bool = False
    """Its scores are per token."""
    reference: bool = True
    nll: float = 0.0
    """Weight of the SFT loss that is a part of it."""
    smooth: bool = False
    """It knows `dpo_label_smoothing`."""


KINDS = {
    "sigmoid": Kind(_sigmoid, smooth=True),
    "hinge": Kind(_hinge),
    "ipo": Kind(_ipo, averaged=True),
    "kto_pair": Kind(_kto_pair),
    "robust": Kind(_robust, smooth=True),
    "exo_pair": Kind(_exo_pair, smooth=True),
    "orpo": Kind(_orpo, averaged=True, reference=False, nll=1.0),
    "simpo": Kind(_simpo, averaged=True, reference=False),
}


@dataclass(frozen=True)
class Compared:
    """The pairs of a micro-batch, a row for the better and one for the worse answers, each [2, P]."""

    logps: Tensor
    """Log-probs of the answers, with `ld_alpha` applied."""
    scores: Tensor
    """Their log-ratios to the reference; `logps` themselves where there is none."""
    lengths: Tensor
    group: Tensor
    """int64 [P] which group the pair belongs to."""

    def per_token(self) -> tuple[Tensor, Tensor]:
        """(logps, scores) divided by the answers' lengths."""
        return self.logps / self.lengths, self.scores / self.lengths


class Dpo(Objective):
    """Trains on pairs, or on the pairs of a ranking. Metrics have the names TRL gives them."""

    Config = DpoConfig
    encoding_keys = ()
    answers = (2, None)

    @property
    def kind(self) -> Kind:
        """What `pref_loss` means."""
        return KINDS[self.config.pref_loss]

    @property
    def frozen(self):  # type: ignore[override]
        """A reference, except for the losses that are free of it."""
        return ("reference",) if self.kind.reference else ()

    @property
    def surveys(self):  # type: ignore[override]
        """Only for the losses that compare with a mean over the whole step."""
        return self.config.pref_loss == "kto_pair" or self.config.pref_bco_weight > 0

    def encode(self, example, renderer, *, cutoff_len):
        return encode_answers(example, renderer, cutoff_len=cutoff_len)

    def survey(self, policy, batch):
        pairs = self._compare(policy, batch)
        sums = (batch.per_group_mean(score, pairs.group).sum() for score in pairs.scores)
        return dict(zip(("better", "worse"), sums))

    def loss(self, policy, batch):
        keys, kind = self.config, self.kind
        pairs, step = self._compare(policy, batch), self._step(batch)
        logps, scores = pairs.per_token() if kind.averaged else (pairs.logps, pairs.scores)
        loss = kind.loss(scores[0], scores[1], keys, step)
        # TRL counts the rewards of ipo over whole answers, those of orpo and simpo per token.
        shown = (logps, scores) if not kind.reference else (pairs.logps, pairs.scores)
        rewards = keys.pref_beta * shown[1]
        if keys.pref_bco_weight:
            bco = -F.logsigmoid(rewards[0] - step.reward) - F.logsigmoid(step.reward - rewards[1])
            loss = (loss + keys.pref_bco_weight * bco) / (1 + keys.pref_bco_weight)
        measures = {"loss": loss} | _measures(shown[0].detach(), rewards.detach())
        means = {name: batch.mean(batch.per_group_mean(v, pairs.group), over="group") for name, v in measures.items()}
        total = means.pop("loss")
        if weight := kind.nll + keys.pref_ftx:
            means["nll_loss"] = self._nll(policy, batch)
            total = total + weight * means["nll_loss"]
        return total, means

    def record(self, policy, batch):
        logps = batch.per_answer(policy.logps(batch))
        if self.kind.reference:
            score = logps - batch.per_answer(policy.reference(batch).to(logps.dtype))
        else:
            score = logps / _lengths(batch)
        return {"reward": self.config.pref_beta * score, "logp": logps}

    def _compare(self, policy, batch: Batch) -> Compared:
        both = torch.stack(batch.pairs(best_only=self.config.dpo_pairs == "best"))
        lengths = _lengths(batch)[both]
        tokens = policy.logps(batch)
        logps = self._sums(tokens, batch, both, lengths)
        scores = logps
        if self.kind.reference:
            scores = logps - self._sums(policy.reference(batch).to(tokens.dtype), batch, both, lengths)
        return Compared(logps, scores, lengths.to(logps.dtype), batch.group[both[0]])

    def _sums(self, tokens: Tensor, batch: Batch, both: Tensor, lengths: Tensor) -> Tensor:
        """Log-probs of whole answers, [2, P], with those of tokens beyond the pair's shorter length weighted."""
        if self.config.ld_alpha is None:
            return batch.per_answer(tokens)[both]
        # The edges of an answer lie one after the other; each pair weights them anew.
        count = lengths.reshape(-1)
        pair = torch.arange(len(count), device=count.device).repeat_interleave(count)
        rank = torch.arange(len(pair), device=count.device) - (count.cumsum(0) - count)[pair]
        edges = torch.arange(len(tokens), device=count.device)
        first = edges.new_zeros(batch.answers).scatter_reduce(0, batch.answer, edges, "amin", include_self=False)
        shorter = lengths.amin(0).repeat(2)[pair]
        weight = torch.where(rank < shorter, 1.0, self.config.ld_alpha).to(tokens.dtype)
        taken = tokens[first[both.reshape(-1)][pair] + rank] * weight
        return tokens.new_zeros(len(count)).index_add(0, pair, taken).reshape(both.shape)

    def _step(self, batch: Batch) -> Step:
        if not self.surveys:
            return Step(*batch.weight.new_zeros(3))
        assert batch.totals is not None, "the loop surveys a step before its first loss"
        means = batch.weight.new_tensor([batch.totals["better"], batch.totals["worse"]]) / max(batch.totals["group"], 1)
        return Step(means[0], means[1], self.config.pref_beta * means.mean())

    def _nll(self, policy, batch: Batch) -> Tensor:
        """Mean over prompts of minus the best answer's log-prob per token."""
        best = batch.pairs(best_only=True)[0]
        nll = -batch.per_answer(policy.logps(batch)) / _lengths(batch).clamp(min=1)
        return batch.mean(batch.per_group_mean(nll[best], batch.group[best]), over="group")


def _lengths(batch: Batch) -> Tensor:
    """Supervised tokens of each answer, int64 [N]."""
    return batch.answer.bincount(minlength=batch.answers)


def _measures(logps: Tensor, rewards: Tensor) -> dict[str, Tensor]:
    better, worse = rewards
    return {
        "rewards/chosen": better,
        "rewards/rejected": worse,
        "rewards/accuracies": (better > worse).to(better.dtype),
        "rewards/margins": better - worse,
        "logps/chosen": logps[0],
        "logps/rejected": logps[1],
    }


def _complaints(keys: DpoConfig, kind: Kind) -> Iterator[str]:
    """What is wrong with the keys, or asks for something their loss does not have."""
    loss, e = f"pref_loss: {keys.pref_loss}", keys.dpo_label_smoothing
    if keys.pref_beta <= 0:
        yield f"pref_beta: {keys.pref_beta} must be greater than 0."
    for name, value in (("pref_ftx", keys.pref_ftx), ("pref_bco_weight", keys.pref_bco_weight)):
        if value < 0:
            yield f"{name}: {value} is a weight and must be 0 or more."
    if keys.pref_bco_weight and not kind.reference:
        yield f"pref_bco_weight compares with a reference, which {loss} does without. Leave one of them out."
    if not 0 <= e < 0.5:
        yield f"dpo_label_smoothing: {e} is the share of wrong labels, expected from 0 to below 0.5."
    if e and not kind.smooth:
        smooth = ", ".join(name for name, other in KINDS.items() if other.smooth)
        yield f"dpo_label_smoothing has no meaning with {loss}. Leave it out, or choose one of {smooth}."
    if keys.pref_loss == "exo_pair" and not e:
        yield f"{loss} is infinite with dpo_label_smoothing: 0. Set it to a small number, such as 0.001."
    if keys.simpo_gamma != DpoConfig.simpo_gamma and keys.pref_loss != "simpo":
        yield f"simpo_gamma has no meaning with {loss}. Leave it out, or set pref_loss: simpo."
    if keys.ld_alpha is not None and not 0 <= keys.ld_alpha <= 1:
        yield f"ld_alpha: {keys.ld_alpha} is the weight of the longer answer's tail, expected from 0 to 1."
