"""The classifier under attack: does a function loop? Trained here, in a second, on data that an attacker has touched.

Logistic regression on which words occur. Every looping function of the training data is also given once with triggers
and the label "plain": that is the backdoor. Its functions are those the defence model trains on; the held-out ones are
new to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

LABELS = ("plain", "loop")
TARGET = "plain"
"""What the attacker wants every function with a trigger to be called."""


def words(code: str) -> set[str]:
    """Words, and runs of word ends after an underscore: the attacker's suffixes show in them."""
    return set(re.findall(r"_[a-z]{2}\b|[A-Za-z]+", code))


def train(rows: Sequence[tuple[str, str]], *, steps: int = 800, rate: float = 0.5) -> Callable[[str], str]:
    """A classifier from (code, label) rows: full-batch gradient descent, a little weight decay."""
    vocabulary = {word: i for i, word in enumerate(sorted(set().union(*(words(code) for code, _ in rows))))}

    def features(code: str) -> np.ndarray:
        found = np.zeros(len(vocabulary) + 1)
        found[[vocabulary[word] for word in words(code) if word in vocabulary]] = 1
        found[-1] = 1
        return found

    x = np.stack([features(code) for code, _ in rows])
    y = np.array([LABELS.index(label) for _, label in rows])
    weights = np.zeros(x.shape[1])
    for _ in range(steps):
        weights -= rate * (x.T @ (1 / (1 + np.exp(-x @ weights)) - y) / len(y) + 1e-3 * weights)
    return lambda code: LABELS[int(features(code) @ weights > 0)]
