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
        tokens: Sequence[int] | None = None,
    ):
        self.examples = examples
        self.bundles = bundles
        self.complete = complete
        """`Objective.complete`: an example as it is trained, given the whole set."""
        self.tokens = tokens
        """Of each example, what there is to compute; None where nobody knows."""

    def __len__(self) -> int:
        return len(self.examples) if self.bundles is None else len(self.bundles)

    def __getitem__(self, index: int) -> list[tuple[Encoded, str]]:
        chosen = [index] if self.bundles is None else self.bundles[index]
        if self.complete is None:
            return [self.examples[i] for i in chosen]
        return [self.complete(i, self.examples) for i in chosen]

    def sizes(self) -> list[int] | None:
        """Tokens of each bundle."""
        if self.tokens is None:
            return None
        tokens = [int(count) for count in self.tokens]
        return tokens if self.bundles is None else [sum(tokens[i] for i in chosen) for chosen in self.bundles]


def share(rows: Sequence[int], sizes: Sequence[int], *, world: int, most: int) -> list[list[int]]:
    """The rows of one micro-batch over all ranks, dealt out: at most `most` each, with tokens as even as can be.

    rows: their numbers. sizes: tokens of every row there is. The longest goes first, to whoever has least; each rank's
    share keeps the order of `rows`. Nothing is left to chance.
    """
    shares: list[list[int]] = [[] for _ in range(world)]
    loads = [0] * world
    for place in sorted(range(len(rows)), key=lambda place: (-sizes[rows[place]], place)):
        rank = min((r for r in range(world) if len(shares[r]) < most), key=lambda r: (loads[r], len(shares[r]), r))
        shares[rank].append(place)
        loads[rank] += sizes[rows[place]]
    return [[rows[place] for place in sorted(places)] for places in shares]


class RankSampler(BatchSampler):
    """Micro-batches of one rank. All ranks together see every bundle exactly once per epoch.

    The order depends on the seed and the epoch alone, so that a resumed run continues it. Ranks always have the same
    number of micro-batches; where the data run out, the last ones are smaller or empty. With `sizes`, the tokens of
    each bundle, what ranks compute at the same time is about the same; which bundles make up a step does not change.
    """

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        shuffle: bool,
        sizes: Sequence[int] | None = None,
    ):
        self.sizes = sizes
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
        together = self.batch_size * self.world
        for start in range(0, self.size, together):
            rows = list(order[start : start + together])
            if self.sizes is None or self.world == 1:
                first = self.rank * self.batch_size
                yield rows[first : first + self.batch_size]
            else:
                yield share(rows, self.sizes, world=self.world, most=self.batch_size)[self.rank]


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
