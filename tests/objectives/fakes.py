"""A policy that says what it is told, and batches of nothing but groups and scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from luthier.core.batch import Batch
from luthier.core.types import Encoded, Path
from luthier.data.layout import collate


class Oracle:
    """Answers `verdict` with a given tensor [N, width]."""

    def __init__(self, verdict: torch.Tensor):
        self.said = verdict

    def verdict(self, batch: Batch) -> torch.Tensor:
        return self.said


def scored(groups: Sequence[Sequence[float]]) -> Batch:
    """A batch of one group per list of scores; its tokens mean nothing."""
    items = [
        (Encoded(tuple(Path([7, 8 + n], [0.0, 1.0], score=score) for n, score in enumerate(group))), f"row {number}")
        for number, group in enumerate(groups)
    ]
    return collate(items, layout="padded", pad_id=3)
