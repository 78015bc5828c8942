"""Best of n: several answers to one prompt, and how one of them is chosen.

best    the highest mean log-prob
vote    answers that are the same text stand together; the one with the largest share of
        softmax(mean log-prob) wins (the front-door vote of FABE, Liu et al. 2024, over texts)
rm      the highest reward, or lower confidence bound of it, of a reward model
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.core.types import Encoded, Path

if TYPE_CHECKING:
    from luthier.engines._trees import Trees


@dataclass(frozen=True)
class Candidate:
    """One of the answers to a prompt."""

    text: str
    logp: float
    """Mean log-prob of its tokens, the one that ended it included, without temperature or cuts."""
    said: Mapping[str, float] = field(default_factory=dict)
    """What the reward model said."""
    worth: float = math.nan
    """The reward model's number that it is ranked by."""


def mean_logps(
    trees: Trees, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]], size: int
) -> list[list[float]]:
    """The mean log-prob of each answer [prompt][n]; all answers to a prompt are computed on one tree.

    answers: token ids, none empty. size: prompts a batch.
    """
    import torch

    items = [
        Encoded(tuple(Path([*prompt, *ids], [0.0] * len(prompt) + [1.0] * len(ids)) for ids in several))
        for prompt, several in zip(prompts, answers)
    ]
    found: list[float] = []
    for batch in trees.batches(items, size):
        with torch.no_grad():
            sums = batch.per_answer(trees.setup.bind().logps(batch))
            found += (sums / batch.per_answer(torch.ones_like(batch.weight)).to(sums.dtype)).tolist()
    rest = iter(found)
    return [[next(rest) for _ in several] for several in answers]


def best(candidates: Sequence[Candidate]) -> tuple[int, list[dict[str, Any]]]:
    """The most probable: (its place, nothing more to say about each)."""
    return _highest([one.logp for one in candidates]), [{} for _ in candidates]


def vote(candidates: Sequence[Candidate]) -> tuple[int, list[dict[str, Any]]]:
    """The most probable of the texts that win the vote: (its place, the weight of each in the vote)."""
    weights = _softmax([one.logp for one in candidates])
    texts = [" ".join(one.text.split()) for one in candidates]
    shares: dict[str, float] = {}
    for text, weight in zip(texts, weights):
        shares[text] = shares.get(text, 0.0) + weight
    winner = max(shares, key=shares.__getitem__)
    chosen = _highest([one.logp if text == winner else -math.inf for one, text in zip(candidates, texts)])
    return chosen, [{"weight": weight} for weight in weights]


def by_reward(candidates: Sequence[Candidate]) -> tuple[int, list[dict[str, Any]]]:
    """The one the reward model ranks highest: (its place, what the model said about each)."""
    return _highest([one.worth for one in candidates]), [dict(one.said) for one in candidates]


SELECT: dict[str, Callable[[Sequence[Candidate]], tuple[int, list[dict[str, Any]]]]] = {
    "best": best,
    "vote": vote,
    "rm": by_reward,
}


def _highest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _softmax(values: Sequence[float]) -> list[float]:
    top = max(values)
    shares = [math.exp(value - top) for value in values]
    return [share / sum(shares) for share in shares]
