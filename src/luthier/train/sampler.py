"""The order of training: which bundles of examples each rank sees in each micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from luthier.core.types import Encoded

Complete = Callable[[int, Sequence[tuple[Encoded, str]]], tuple[Encoded, str]]


class Bundles(Dataset):
    """Examples grouped into what one row of a micro-batch holds: single examples, or packed rows."""

    def __init__(
        self,
        examples: Sequence[tuple[Encoded, str]],
        bundles: Sequence[Sequence[int]] | None = None,
        complete: Complete | None = None,
    ):
        self.examples = examples
        self.bundles = bundles
        self.complete = complete
        """`Objective.complete`: an example as it is trained, given the whole set."""

    def __len__(self) -> int:
        return len(self.examples) if self.bundles is None else len(self.bundles)

    def __getitem__(self, index: int) -> list[tuple[Encoded, str]]:
        chosen = [index] if self.bundles is None else self.bundles[index]
        if self.complete is None:
            return [self.examples[i] for i in chosen]
        return [self.complete(i, self.examples) for i in chosen]


class RankSampler(BatchSampler):
    """Micro-batches of one rank. All ranks together see every bundle exactly once per epoch.

    The order depends on the seed and the epoch alone, so that a resumed run continues it. Ranks always have the same
    number of micro-batches; where the data run out, the last ones are smaller or empty.
    """

    def __init__(self, size: int, *, batch_size: int, rank: int = 0, world: int = 1, seed: int = 0, shuffle: bool):
        self.size, self.batch_size, self.rank, self.world = size, batch_size, rank, world
        self.seed, self.shuffle, self.drop_last = seed, shuffle, False
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the loop before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.size // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[int]]:
        order = range(self.size)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
            order = torch.randperm(self.size, generator=generator).tolist()
        for batch in range(len(self)):
            start = (batch * self.world + self.rank) * self.batch_size
            yield list(order[start : start + self.batch_size])


class EpochLoader(DataLoader):
    """A DataLoader that passes the epoch on to its RankSampler, also when a resumed run skips batches."""

    def set_epoch(self, epoch: int) -> None:
        """Called by transformers' Trainer at the start of each epoch."""
        self.batch_sampler.set_epoch(epoch)


@dataclass(frozen=True)
class Rows:
    """What a micro-batch was laid out from: looked at when it could not be computed."""

    bundles: Sequence[Sequence[tuple[Encoded, str]]]


class Collator:
    """Bundles -> {"batch": Batch, "rows": Rows}; a class of its own so that worker processes can be handed it."""

    def __init__(self, collate: Callable[..., Any], **options: Any):
        self.collate, self.options = collate, options

    def __call__(self, bundles: Sequence[Sequence[tuple[Encoded, str]]]) -> dict[str, Any]:
        batch = self.collate([item for bundle in bundles for item in bundle], **self.options)
        return {"batch": batch, "rows": Rows(bundles)}
