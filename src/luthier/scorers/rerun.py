"""Keep the draft token, let the target go on from there, and see whether the final answer stays right.

The labels of AutoJudge (Garipov et al. 2025, arXiv 2504.20039), for one mismatch at a time.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from luthier.core.errors import ConfigError
from luthier.scorers._final import stays_right
from luthier.scorers._spot import UNSCORED, Request, Scorer, Spot


@dataclass(frozen=True, kw_only=True)
class Config:
    """How answers are compared, and how often the target goes on."""

    answer_pattern: str | None = None
    """A regular expression whose last match in an answer is its final answer (the first group, where it has one).
    Unset: the last \\boxed{...}, else the last number."""
    collect_samples: int = 1
    """1: the target goes on greedily, and the score is 0 or 10. More: so many times with `temperature`, `top_p` and
    `top_k`, and the score is the share that stays right."""

    def __post_init__(self) -> None:
        if self.collect_samples < 1:
            raise ConfigError(f"collect_samples: {self.collect_samples} must be 1 or more.")
        try:
            re.compile(self.answer_pattern or "")
        except re.error as error:
            raise ConfigError(f"answer_pattern: {self.answer_pattern!r} is no regular expression: {error}.") from None


class Rerun(Scorer):
    """Right is what the row's own answer comes to, and where the target missed that or there is none, what the
    target's own answer comes to. Where neither comes to anything, mismatches stay unscored."""

    config: Config

    def score(self, spots: Sequence[Spot]) -> list[float]:
        """The share of continuations that stay right."""
        if not spots:
            return []
        request = spots[0].request
        pattern = re.compile(self.config.answer_pattern) if self.config.answer_pattern else None
        right = stays_right(request.reference, self.tools.text(request.answer_ids), pattern)
        if right is None:
            return [UNSCORED] * len(spots)
        kept = [(*spot.before, spot.token) for spot in spots]
        answers = self._answers(request, sorted(set(kept)))
        return [sum(map(right, answers[ids])) / len(answers[ids]) for ids in kept]

    def _answers(self, request: Request, kept: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], list[str]]:
        """Whole answers, as text, that begin with what was kept."""
        tools, times = self.tools, self.config.collect_samples
        context = tools.engine.context
        most = len(request.prompt_ids) + tools.sampling.room(len(request.prompt_ids), context)
        sampling = replace(tools.sampling, do_sample=times > 1, max_new_tokens=0, max_length=most)
        open_ = [ids for ids in kept if ids[-1] not in tools.stop_ids and len(request.prompt_ids) + len(ids) < most]
        asked = [(ids, nth) for ids in open_ for nth in range(times)]
        said = tools.engine.generate(
            [[*request.prompt_ids, *ids] for ids, _ in asked],
            sampling,
            tools.stop_ids,
            seeds=[_seed(tools.seed, request.row, ids, nth) for ids, nth in asked],
        )
        answers: dict[tuple[int, ...], list[str]] = {ids: [] for ids in kept}
        for (ids, _), more in zip(asked, said):
            answers[ids].append(tools.text([*ids, *more]))
        return {ids: texts or [tools.text(ids)] for ids, texts in answers.items()}


def _seed(seed: int, row: int, ids: Sequence[int], nth: int) -> int:
    """What is drawn after a beginning is drawn again by a run that goes on, whatever else it draws."""
    text = f"{seed} {row} {nth} {' '.join(map(str, ids))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
