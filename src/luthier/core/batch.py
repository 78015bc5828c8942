"""A Batch: forests of tokens in rows, what is supervised in them, and the one place where a mean is taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Alone:
    """The answers of a batch, each in a padded row of its own: for models that place tokens by more than order."""

    arguments: Mapping[str, Tensor]
    """What the model's `get_rope_index` is asked with."""
    place: Tensor
    """int64 [X] flat index of each token in those rows, and `node`, where the same token stands in the batch."""
    node: Tensor
    """int64 [X]"""

    def to(self, device: torch.device | str) -> Alone:
        """The same with every tensor on `device`."""
        arguments = {name: value.to(device) for name, value in self.arguments.items()}
        return Alone(arguments, self.place.to(device), self.node.to(device))


@dataclass(frozen=True)
class Batch:
    """One micro-batch, in whatever layout; objectives cannot tell which.

    Letters: R rows, T tokens per row, E supervised edges, U distinct supervised tokens, N answers, G groups.
    Indices into tokens are flat: row * T + column.
    """

    ids: Tensor
    """int64 [R, T] token ids; padding repeats an ordinary id and is invisible to every other token."""
    position: Tensor
    """int64 [R, T] depth of each token in its tree: its position in the unshared sequence."""
    end: Tensor
    """int64 [R, T] one past the token's last descendant, within the row. q sees k <=> k <= q < end[k]."""
    target: Tensor
    """int64 [U] flat index of each supervised token, each once."""
    source: Tensor
    """int64 [U] flat index of that token's parent: where its logits are read."""
    edge: Tensor
    """int64 [E] which of the U a supervised edge is about; a shared token may serve several answers."""
    answer: Tensor
    """int64 [E] which answer the edge belongs to."""
    weight: Tensor
    """float64 [E] loss weight of the edge, > 0."""
    last: Tensor
    """int64 [N] flat index of each answer's last token."""
    group: Tensor
    """int64 [N] which group (example) each answer belongs to."""
    score: Tensor
    """float64 [N] the answer's score, NaN where nobody scored it."""
    better: Tensor
    """int64 [P] and `worse`: every pair of answers of one group whose scores differ."""
    worse: Tensor
    """int64 [P] the answer with the lower score of each pair."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """[E] values an objective declared, at the supervised tokens; NaN where there is nothing."""
    segments: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    """(start, stop, ancestors) of each unbranched run of a single-row layout; ancestors are the indices of the runs
    above it, root first. Empty for padded rows."""
    block: Tensor | None = None
    """int64 [R, T]: tokens with the same number see one another in both directions; -1: none. None: no such tokens."""
    layout: str = "padded"
    """padded | packed | shared: how the rows were made."""
    names: tuple[str, ...] = ()
    """[G] where each group came from, for messages: file and row."""
    extras: tuple[Mapping[str, Any], ...] = ()
    """[G] what each group's `Encoded.extra` says."""
    media: Mapping[str, Tensor] = field(default_factory=dict)
    """What the model's forward call is given beside ids: what its processor made of the images in the rows."""
    alone: Alone | None = None
    """Where rows that are not padded show images."""
    hidden: Tensor | None = None
    """[E, H] hidden states at the supervised tokens, where they were computed beforehand (see `model/head_only.py`)."""
    tokens: int = 0
    """Tokens computed, without padding."""
    unshared: int = 0
    """Tokens a plain computation (one sequence per answer, no padding) would compute."""
    aside: Batch | None = None
    """Paths an objective only surveys, without gradient, before the step (see `Objective.survey`)."""
    totals: Mapping[str, float] | None = None
    """Units of the whole optimiser step, over all micro-batches and ranks, and what the objective's survey summed;
    set by the loop before the loss."""
    progress: float = 1.0
    """Share of the training steps done before this one, 0 to 1; set by the loop. 1 in evaluation."""

    @property
    def answers(self) -> int:
        """N, the answers in this micro-batch."""
        return len(self.last)

    def units(self) -> dict[str, float]:
        """What a mean may be taken over, and how many of each this micro-batch holds."""
        counts = {
            "token": float(self.weight.sum()),
            "answer": float(len(self.last)),
            "group": float(len(self.names)),
        }
        return counts | {name: float((~values.isnan()).sum()) for name, values in self.columns.items()}

    def mean(self, values: Tensor, *, over: str) -> Tensor:
        """This micro-batch's share of the mean over the whole optimiser step.

        values: [E] for `token` (weighted by the edges' weights) and for a column (taken where it is not NaN),
        [N] for `answer`, [G] for `group`. Summed over micro-batches and ranks, the shares are the exact mean.
        """
        totals = self.totals if self.totals is not None else self.units()
        if over not in totals:
            raise ValueError(f"no unit named {over!r}; there are: {', '.join(sorted(totals))}")
        if over == "token":
            values = values * self.weight.to(values.dtype)
        elif over in self.columns:
            values = torch.where(self.columns[over].isnan(), torch.zeros_like(values), values)
        return values.sum() / max(totals[over], torch.finfo(torch.float64).tiny)

    def per_answer(self, values: Tensor) -> Tensor:
        """Sum edge values [E] into answers [N], weighted by nothing: log-probs of answers from those of tokens."""
        # A hundred log-probs added one after the other in float32 lose more than the differences that losses look at.
        exact = values if values.device.type == "mps" else values.double()
        return exact.new_zeros(self.answers).index_add(0, self.answer, exact).to(values.dtype)

    def pairs(self, *, best_only: bool = False) -> tuple[Tensor, Tensor]:
        """(better, worse), int64 [P] each: all pairs, or only those of a group's best answer against the others."""
        if not best_only or not len(self.better):
            return self.better, self.worse
        top = torch.full((len(self.names),), -torch.inf, dtype=self.score.dtype, device=self.score.device)
        top = top.scatter_reduce(0, self.group[self.better], self.score[self.better], "amax")
        best = self.score[self.better] == top[self.group[self.better]]
        return self.better[best], self.worse[best]

    def per_group_mean(self, values: Tensor, group: Tensor) -> Tensor:
        """Mean of values [X] within each group, [G]; `group` [X] says where each belongs. 0 for a group with none.

        A group's size is a fact of its example, so that a mean over groups stays exact however a step is cut.
        """
        zeros = values.new_zeros(len(self.names))
        counts = zeros.index_add(0, group, torch.ones_like(values))
        return zeros.index_add(0, group, values) / counts.clamp(min=1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`."""
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        columns = {name: value.to(device, non_blocking=non_blocking) for name, value in self.columns.items()}
        media = {name: value.to(device, non_blocking=non_blocking) for name, value in self.media.items()}
        aside = None if self.aside is None else self.aside.to(device, non_blocking)
        alone = None if self.alone is None else self.alone.to(device)
        return replace(self, **moved, columns=columns, media=media, alone=alone, aside=aside)

    def with_totals(self, totals: Mapping[str, float], progress: float = 1.0) -> Batch:
        """The same batch, told how many units the whole optimiser step holds, and how far the run is."""
        return replace(self, totals=dict(totals), progress=progress)


def total_units(batches: Iterable[Batch]) -> dict[str, float]:
    """Units of several micro-batches together."""
    totals: dict[str, float] = {}
    for batch in batches:
        for name, count in batch.units().items():
            totals[name] = totals.get(name, 0.0) + count
    return totals
