"""Speculative rounds along an answer that is known: what a drafter would have proposed, what the target says to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luthier.core.prefix import common_prefix

if TYPE_CHECKING:
    from luthier.engines.target import Draft, Drafter, Target


@dataclass(frozen=True)
class Mismatch:
    """A draft token that the target would not have chosen, in the target's eyes."""

    index: int
    """Place in the draft."""
    kl: float
    """KL(q || p) in nats, q the drafter's distribution and p the target's; -ln p(draft) for drafts without one."""
    prob: float
    """p(draft) / max p."""
    rank: int
    """1 + the number of tokens that the target finds more probable."""


@dataclass(frozen=True)
class Round:
    """A draft, and one pass of the target over it."""

    cut: int
    """Answer tokens before it."""
    draft: list[int]
    verifier: list[int]
    """The target's most probable token in place of each draft token, and the one after the last."""
    mismatches: list[Mismatch]


@dataclass(frozen=True)
class Walk:
    """All rounds of one answer."""

    rounds: list[Round]
    empty: int
    """Cuts at which there was no draft."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How answers are walked."""

    draft_tokens: int
    """Most tokens of a draft."""
    stop_ids: tuple[int, ...]
    context: int | None
    """Most tokens that the target can take."""
    stride: int = 0
    """Tokens from one cut to the next; 0: what decoding would have committed."""
    every: bool = False
    """Keep all mismatches of a round; else the first, which alone follows a text that the target agrees with."""


def walk(target: Target, drafter: Drafter, prompt: Sequence[int], answer: Sequence[int], rules: Rules) -> Walk:
    """The rounds of an answer, from its first token to its last.

    Decoding would commit the draft as far as it is the answer, and the answer's next token in place of the rest. A
    draft ends with its first stop token.
    """
    rounds: list[Round] = []
    cut = empty = 0
    while cut < len(answer):
        ids = [*prompt, *answer[:cut]]
        room = rules.draft_tokens if rules.context is None else min(rules.draft_tokens, rules.context - len(ids))
        draft = _until_stop(drafter.propose(ids, room), rules.stop_ids) if room > 0 else None
        if draft is not None and draft.ids:
            rounds.append(_round(target, cut, ids, draft, every=rules.every))
        else:
            empty += 1
        agreed = common_prefix(draft.ids if draft is not None else (), answer[cut:])
        cut += rules.stride or agreed + 1
    return Walk(rounds, empty)


def _round(target: Target, cut: int, ids: Sequence[int], draft: Draft, *, every: bool) -> Round:
    logits = target.verify(ids, draft.ids).logits
    verifier = logits.argmax(-1).tolist()
    places = [i for i, (mine, theirs) in enumerate(zip(draft.ids, verifier)) if mine != theirs]
    mismatches = [_mismatch(i, logits[i], draft) for i in (places if every else places[:1])]
    return Round(cut, list(draft.ids), verifier, mismatches)


def _mismatch(index: int, logits: Tensor, draft: Draft) -> Mismatch:
    """logits: [V] of the target."""
    token = draft.ids[index]
    logp = logits.double().log_softmax(-1)
    if draft.logits is None:
        kl = -logp[token]
    else:
        logq = draft.logits[index].to(logp.device).double().log_softmax(-1)
        # Tokens that the drafter can never say are at minus infinity, and 0 log 0 is 0.
        kl = torch.where(logq > -torch.inf, logq.exp() * (logq - logp), 0.0).sum()
    rank = 1 + int((logits > logits[token]).sum())
    return Mismatch(index, max(0.0, float(kl)), float((logp[token] - logp.max()).exp()), rank)


def _until_stop(draft: Draft, stop_ids: Sequence[int]) -> Draft:
    end = next((i + 1 for i, token in enumerate(draft.ids) if token in stop_ids), len(draft.ids))
    return replace(draft, ids=draft.ids[:end])
