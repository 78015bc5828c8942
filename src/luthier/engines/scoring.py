"""What a trained reward model thinks of answers: the same encoding, layout and head as in training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.core.errors import DataError, ModelError, refuse_all

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.core.objective import Renderer
    from luthier.core.types import Encoded, Example
    from luthier.engines._trees import Trees


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Keys of `score`, and of `infer --select rm`."""

    reward_model: str | None = None
    """The judge of `infer --select rm`: a folder that `luthier train` left behind (stage rm or disco_rm), or the YAML
    file it was trained with."""
    lcb_k: float = 1.0
    """Where the reward model gives a mean and a variance: answers are ranked by mean - lcb_k * standard deviation."""
    score_batch_size: int = 8
    """Prompts whose answers are scored side by side."""

    def __post_init__(self) -> None:
        rules = (
            (math.isfinite(self.lcb_k) and self.lcb_k >= 0, f"lcb_k: {self.lcb_k} must be 0 or more"),
            (self.score_batch_size >= 1, f"score_batch_size: {self.score_batch_size} must be 1 or more"),
        )
        refuse_all(f"{what}." for holds, what in rules if not holds)


Said = Mapping[str, float]
"""What is said about one answer: {reward}, or {mean, variance, lcb}."""

RANKED_BY = ("reward", "lcb")
"""What answers are ranked by; a judge says one of the two."""


def worth(said: Said) -> float:
    """The number that answers are ranked by."""
    return next(said[name] for name in RANKED_BY if name in said)


class Judge:
    """A model with a head of the kind `head` (heads/NAME.py), ready to score."""

    def __init__(self, trees: Trees, renderer: Renderer, *, head: str, cutoff_len: int, config: ScoreConfig):
        if head not in HEADS:
            raise ModelError(f"A {head} head gives no reward; these do: {', '.join(HEADS)}.")
        self._trees = trees
        self._says = HEADS[head]
        self._cutoff_len = cutoff_len
        self._config = config
        self.renderer = renderer

    def encode(self, example: Example) -> Encoded:
        """A prompt and its answers as training encodes them. Raises DataError if `cutoff_len` leaves no answer."""
        from luthier.data.answers import encode_answers

        encoded = encode_answers(example, self.renderer, cutoff_len=self._cutoff_len)
        if not encoded:
            raise DataError(
                f"cutoff_len: {self._cutoff_len} leaves no token of the prompt or of the answers; raise cutoff_len."
            )
        return encoded[0]

    def judge(self, items: Sequence[Encoded]) -> list[list[Said]]:
        """What is said about each answer of each item, in order."""
        import torch

        judged: list[list[Said]] = []
        for batch in self._trees.batches(items, self._config.score_batch_size):
            with torch.no_grad():
                verdict = self._trees.setup.bind().verdict(batch).cpu()
            said = self._says(verdict, self._config.lcb_k)
            judged += ([said[i] for i in (batch.group == group).nonzero()[:, 0]] for group in range(len(batch.names)))
        return judged


def _value(verdict: Tensor, lcb_k: float) -> list[Said]:
    return [{"reward": reward} for reward in verdict[:, 0].tolist()]


def _normal(verdict: Tensor, lcb_k: float) -> list[Said]:
    return [
        {"mean": mean, "variance": variance, "lcb": mean - lcb_k * math.sqrt(variance)}
        for mean, variance in verdict.tolist()
    ]


HEADS = {"value": _value, "normal": _normal}
"""What each kind of head says, from its output [N, width] and lcb_k."""
