"""Pairs of answers as a reward model saw them, and how well it told the better from the worse."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from luthier.core.errors import DataError

Record = tuple[str, Sequence[Mapping[str, float]]]
"""Where an example came from, and what was recorded about each of its answers: score, reward or mean, variance."""
Link = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(gaps [P], variances [P]) -> log P(the first answer of the pair beats the second)."""


@dataclass(frozen=True)
class Pairs:
    """Every two answers to one prompt whose scores differ. All arrays float64 [P]."""

    better: np.ndarray
    """Reward (its mean, if it is a distribution) of the answer with the higher score."""
    worse: np.ndarray
    better_variance: np.ndarray
    """0 for models that give a reward alone."""
    worse_variance: np.ndarray
    weight: np.ndarray
    """Share of the pair in a mean; every prompt weighs the same. Sums to 1."""
    prompts: int
    """Prompts that have pairs."""
    distributed: bool
    """Whether the model gave variances."""

    @property
    def gap(self) -> np.ndarray:
        """Reward of the better answer minus that of the worse."""
        return self.better - self.worse

    @property
    def variance(self) -> np.ndarray:
        """Variance of the gap."""
        return self.better_variance + self.worse_variance

    def mean(self, values: np.ndarray) -> float:
        """Mean over prompts of the mean over their pairs."""
        return float(self.weight @ values)

    def __len__(self) -> int:
        return len(self.weight)


def pairs_of(records: Iterable[Record]) -> Pairs:
    """All pairs of a set of examples. A ranking of K answers has up to K (K - 1) / 2.

    Raises DataError if nothing can be compared, and for an answer without reward.
    """
    rows: list[tuple[float, float, float, float, float]] = []
    examples, prompts, distributed = 0, 0, True
    for origin, answers in records:
        examples += 1
        judged = [(_score(answer), *_judgement(answer, origin)) for answer in answers]
        distributed &= all("variance" in answer for answer in answers)
        found = [(a, b) for a in judged for b in judged if a[0] > b[0]]
        rows += [(a[1], b[1], a[2], b[2], 1 / len(found)) for a, b in found]
        prompts += bool(found)
    if not rows:
        raise DataError(
            f"None of the {examples} examples has two answers with different scores, so there is nothing to compare. "
            "Give pairs (ranking: true) or ranked lists."
        )
    better, worse, better_variance, worse_variance, weight = np.array(rows, np.float64).T
    return Pairs(better, worse, better_variance, worse_variance, weight / prompts, prompts, distributed)


def read_records(predictions: str | Path) -> list[Record]:
    """The records in a generated_predictions.jsonl: {"row", "answers": [{...}]} a line; null is NaN."""
    rows = [json.loads(line) for line in Path(predictions).read_text(encoding="utf-8").splitlines()]
    return [(row["row"], numbers(row["answers"])) for row in rows]


def numbers(answers: Iterable[Mapping[str, float | None]]) -> list[dict[str, float]]:
    """Answers as JSON told them, null as NaN again."""
    return [{name: math.nan if value is None else value for name, value in answer.items()} for answer in answers]


def sigmoid_link(gap: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Bradley-Terry: log sigma(gap), whatever the variance."""
    return -np.logaddexp(0.0, -gap)


def accuracy(pairs: Pairs) -> float:
    """Share of pairs whose better answer has the higher reward; a tie is a miss."""
    return pairs.mean(pairs.gap > 0)


def scores(pairs: Pairs, link: Link) -> dict[str, float]:
    """accuracy, margin, and the proper scores of P: nll = -log P and brier = (1 - P)^2; means over prompts."""
    log_p = link(pairs.gap, pairs.variance)
    found = {
        "accuracy": accuracy(pairs),
        "margin": pairs.mean(pairs.gap),
        "nll": pairs.mean(-log_p),
        "brier": pairs.mean(np.expm1(log_p) ** 2),
    }
    if pairs.distributed:
        found["variance_better"] = pairs.mean(pairs.better_variance)
        found["variance_worse"] = pairs.mean(pairs.worse_variance)
    return found


def _score(answer: Mapping[str, float]) -> float:
    # Nothing is greater than NaN, nor NaN greater than anything: an answer that nobody scored is in no pair.
    return float(answer.get("score", math.nan))


def _judgement(answer: Mapping[str, float], origin: str) -> tuple[float, float]:
    reward = answer.get("reward", answer.get("mean"))
    if reward is None:
        known = ", ".join(answer)
        raise DataError(
            f"{origin}: an answer has neither reward nor mean (only {known}); it comes from no reward model."
        )
    return float(reward), float(answer.get("variance", 0.0))
