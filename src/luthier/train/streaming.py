"""A stream as the Trainer's loader: chunks made ahead in other processes, micro-batches in one exact order.

Ranks take turns at chunks. The order depends on the seed, the data and the number of ranks, not on the number of
processes that make chunks. `place` is where the next micro-batch begins, for checkpoints.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from luthier.core.errors import CheckpointError
from luthier.core.log import get_logger
from luthier.data.encode import judge
from luthier.data.report import Tally
from luthier.data.stream import Item, Stream

log = get_logger("data")


class _Turns(Sampler[int]):
    """Every `world`-th chunk from `start` on, without end."""

    def __init__(self, start: int, world: int):
        self.start, self.world = start, world

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start, self.world)


class StreamLoader:
    """Micro-batches of one rank, without end. `max_steps` ends the run."""

    def __init__(
        self,
        stream: Stream,
        collate: Callable[[Sequence[Sequence[Item]]], Any],
        *,
        batch_size: int,
        workers: int = 0,
        ahead: int | None = None,
        rank: int = 0,
        world: int = 1,
        max_bad_rows: float = 1.0,
    ):
        self.dataset = stream
        self.place = (rank, 0)
        """(chunk, bundle in it) where the next micro-batch begins."""
        self.tallies = [Tally() for _ in stream.jobs]
        """What was counted of the rows so far, by data set; a resumed run counts from where it goes on."""
        self._collate, self._batch_size, self._world = collate, batch_size, world
        self._workers, self._ahead, self._max_bad_rows = workers, ahead, max_bad_rows

    def set_epoch(self, epoch: int) -> None:
        """Called by transformers' Trainer; a stream knows its own epochs."""

    def go_on(self, place: Sequence[int], world: int) -> None:
        """Begin where a checkpoint's run would have gone on. Raises CheckpointError for another number of ranks."""
        if world != self._world or len(place) != 2:
            raise CheckpointError(
                f"This checkpoint was written by {world} processes that streamed their data, and this run has "
                f"{self._world}. Which rows were trained follows from that number: go on with {world} processes."
            )
        self.place = (int(place[0]), int(place[1]))

    def __iter__(self) -> Iterator[Any]:
        chunk, done = self.place
        ready: list[list[Item]] = []
        for number, made in zip(itertools.count(chunk, self._world), self._chunks(chunk)):
            self._count(made.tallies)
            for nth, bundle in enumerate(made.bundles[done:], done + 1):
                ready.append(bundle)
                if len(ready) == self._batch_size:
                    self.place = (number, nth)
                    yield self._collate(ready)
                    ready = []
            done = 0

    def _chunks(self, start: int) -> DataLoader:
        return DataLoader(
            self.dataset,  # type: ignore[arg-type]
            sampler=_Turns(start, self._world),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self._workers,
            prefetch_factor=self._ahead if self._workers else None,
            # Its own: a loader that begins again after a resume must not draw from the numbers that dropout uses.
            generator=torch.Generator().manual_seed(0),
        )

    def _count(self, found: dict[int, Tally]) -> None:
        for nth, tally in found.items():
            fresh = [reason for reason in tally.bad if reason not in self.tallies[nth].bad]
            for reason in fresh:
                first = tally.bad[reason].first
                log.warning("WARNING: rows are left out: %s: %s", reason, "; ".join(first))
            self.tallies[nth].add(tally)
            judge(self.dataset.jobs[nth], self.tallies[nth], self._max_bad_rows)


def _as_it_is(made: Any) -> Any:
    return made
