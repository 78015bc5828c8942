"""Drafting with a model: the most probable token, again and again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.engines.target import Cached, Draft


class Greedy:
    """A drafter with a model and a cache of its own.

    vocabulary: rows of the target's output. Rows that the drafter has beyond them are never drafted; those it lacks
    have logits of minus infinity.
    """

    def __init__(self, model: Cached, vocabulary: int):
        self.model = model
        self._vocabulary = vocabulary

    def propose(self, ids: Sequence[int], count: int) -> Draft:
        """`count` tokens, each the drafter's most probable after those before it."""
        drafted: list[int] = []
        rows: list[Tensor] = []
        for _ in range(count):
            logits = self.model.run([*ids, *drafted]).logits
            # A negative width cuts.
            rows.append(F.pad(logits, (0, self._vocabulary - logits.shape[1]), value=float("-inf")))
            drafted.append(int(rows[-1].argmax()))
        return Draft(drafted, torch.cat(rows)) if rows else Draft()

    def forget(self) -> None:
        """Empty the cache."""
        self.model.forget()
