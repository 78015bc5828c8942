"""Greedy speculative decoding (Leviathan et al. 2023), and the same with a judge (Bachmann et al. 2025).

    a round   the drafter proposes d[0..g-1]; one pass of the target gives v[0..g], the most probable token in place
              of each d[i] and after the last
              ok[i] = d[i] == v[i], or the judge's probability of d[i] >= threshold
              n     = how many are ok before the first that is not
              d[:n] and v[n] are committed

Without a judge every token is the one that plain greedy decoding gives.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from luthier.engines.target import Drafter, Pass, Target


class Judge(Protocol):
    """Says how good draft tokens are that the target would not have chosen."""

    threshold: float

    def probabilities(
        self, context: Sequence[int], draft: Sequence[int], verifier: Sequence[int], seen: Pass
    ) -> list[float]:
        """One for each draft token; those missing at the end are not good enough."""

    def forget(self) -> None:
        """Let go of what is remembered of earlier texts."""


@dataclass(frozen=True)
class Round:
    """One pass of the target, and what came of it."""

    ids: list[int]
    """What was committed; the last may be a stop token, after which there is no other round."""
    drafted: int
    kept: int
    """Tokens of the draft among `ids`."""
    judged: int
    """Those of them that the target would not have chosen."""
    seconds: tuple[float, float, float]
    """Drafting, verifying, judging."""


@dataclass
class Tally:
    """What rounds add up to."""

    tokens: int = 0
    passes: int = 0
    drafted: int = 0
    kept: int = 0
    judged: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    judge_seconds: float = 0.0

    def add(self, done: Round) -> None:
        """Count one more round."""
        self.tokens += len(done.ids)
        self.passes += 1
        self.drafted += done.drafted
        self.kept += done.kept
        self.judged += done.judged
        self.draft_seconds += done.seconds[0]
        self.verify_seconds += done.seconds[1]
        self.judge_seconds += done.seconds[2]

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that one pass of the target brings; 1 without speculation."""
        return self.tokens / max(self.passes, 1)


class Speculator:
    """A target with a drafter (None: plain greedy decoding) and perhaps a judge; one text at a time.

    draft_tokens: most tokens of a draft.
    """

    def __init__(self, target: Target, drafter: Drafter | None, judge: Judge | None = None, *, draft_tokens: int = 5):
        self.target = target
        self.drafter = drafter
        self.judge = judge
        self._draft_tokens = draft_tokens

    def rounds(
        self,
        prompt: Sequence[int],
        room: int,
        stop_ids: Iterable[int],
        *,
        repetition_penalty: float = 1.0,
    ) -> Iterator[Round]:
        """The answer to a prompt, round by round: `room` tokens, or until the first stop token, which is the last."""
        stops, answer = frozenset(stop_ids), []
        choose = _Choice(repetition_penalty)
        while room > 0:
            ids = [*prompt, *answer]
            clock = [time.perf_counter()]
            draft = self._draft(ids, min(self._draft_tokens, room - 1), stops)
            clock.append(time.perf_counter())
            seen = self.target.verify(ids, draft)
            verifier = choose(ids, draft, seen.logits)
            clock.append(time.perf_counter())
            matches = [mine == theirs for mine, theirs in zip(draft, verifier)]
            good = matches
            if self.judge is not None and not all(matches) and self.judge.threshold <= 1:
                good = _accept(matches, self.judge.probabilities(ids, draft, verifier, seen), self.judge.threshold)
            clock.append(time.perf_counter())
            kept = next((i for i, fine in enumerate(good) if not fine), len(good))
            committed = until_stop([*draft[:kept], verifier[kept]], stops)
            answer += committed
            room = 0 if committed[-1] in stops else room - len(committed)
            spent = tuple(after - before for before, after in zip(clock, clock[1:]))
            yield Round(committed, len(draft), kept, kept - sum(matches[:kept]), spent)

    def forget(self) -> None:
        """Empty all caches, so that a measurement begins with nothing."""
        for part in (self.target, self.drafter, self.judge):
            if part is not None:
                part.forget()

    def _draft(self, ids: Sequence[int], count: int, stops: frozenset[int]) -> list[int]:
        if self.drafter is None or count < 1:
            return []
        return until_stop(self.drafter.propose(ids, count).ids, stops)


def until_stop(ids: Sequence[int], stops: Iterable[int]) -> list[int]:
    """The ids up to the first stop token, that one included."""
    return list(next((ids[: i + 1] for i, token in enumerate(ids) if token in stops), ids))


class _Choice:
    """The token that greedy decoding takes at each place of a draft."""

    def __init__(self, repetition_penalty: float):
        self._penalise = RepetitionPenaltyLogitsProcessor(repetition_penalty) if repetition_penalty != 1 else None

    def __call__(self, ids: Sequence[int], draft: Sequence[int], logits: Tensor) -> list[int]:
        """logits [g + 1, V] after `ids` and each token of the draft -> g + 1 tokens."""
        logits = logits.float()  # as in plain decoding: ties must fall the same way
        if self._penalise is None:
            return logits.argmax(-1).tolist()
        before = torch.tensor([[*ids, *draft]], device=logits.device)
        rows = (self._penalise(before[:, : len(ids) + i], row[None]) for i, row in enumerate(logits))
        return [int(row.argmax()) for row in rows]


def _accept(matches: Sequence[bool], probabilities: Sequence[float], threshold: float) -> list[bool]:
    judged = [p >= threshold for p in probabilities] + [False] * (len(matches) - len(probabilities))
    return [match or fine for match, fine in zip(matches, judged)]
