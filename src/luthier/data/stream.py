"""`streaming: true`: rows read and encoded while training, a chunk at a time.

The order of rows depends on the seed and the data alone: the mixed rows of an epoch in blocks of `buffer_size`, each
shuffled; a chunk is `preprocessing_batch_size` rows of that order. Any chunk can be made by itself, so that any number
of processes make them ahead, ranks take turns at them, and a resumed run begins with the chunk it was in.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from luthier.core.log import get_logger
from luthier.core.types import Encoded
from luthier.data.encoder import Job, encode_items
from luthier.data.mix import Pairs
from luthier.data.plan import pack
from luthier.data.report import Tally
from luthier.data.store import NUMBERS, measure, supervised

log = get_logger("data.stream")

Item = tuple[Encoded, str]
"""An example and `file:row`."""


class Examples(list[Item]):
    """Examples in memory, with what a stored set knows of its own."""

    def __init__(self, items: Sequence[Item]):
        super().__init__(items)
        counts = np.array([measure(encoded) for encoded, _ in items], np.int64).reshape(len(items), -1)
        named = dict(zip(NUMBERS[-counts.shape[1] :], counts.T)) if len(items) else {}
        none = np.zeros(0, np.int64)
        self.answers: np.ndarray = named.get("answers", none)
        self.tree_tokens: np.ndarray = named.get("tree_tokens", none)
        self.path_tokens: np.ndarray = named.get("path_tokens", none)
        self.longest: np.ndarray = named.get("longest", none)
        self.supervised: np.ndarray = named.get("supervised", none)


@dataclass
class Made:
    """One chunk."""

    bundles: list[list[Item]]
    """Examples as they share rows of a micro-batch."""
    tallies: dict[int, Tally] = field(default_factory=dict)
    """What was counted, by data set."""


@dataclass(frozen=True)
class Stream:
    """The chunks of a run, numbered from 0 without end. Picklable."""

    jobs: tuple[Job, ...]
    pairs: Pairs | None
    """(set, row) of an epoch in order; None: the rows of the only set, as they are."""
    skip: int
    """Rows at the beginning of the order that are held out."""
    seed: int
    shuffle: bool
    block: int
    """Rows that are shuffled among one another."""
    rows: int
    """Rows of a chunk."""
    capacity: int | None
    """Packing: most tokens of a bundle."""

    @property
    def epoch(self) -> int:
        """Rows of an epoch."""
        total = sum(map(len, self.jobs[0].files)) if self.pairs is None else len(self.pairs)
        return total - self.skip

    def laid_out(self, capacity: int | None, *, shuffle: bool, seed: int | None = None) -> Stream:
        """The same rows, packed or not, shuffled or not. seed: of the order, where it has one of its own."""
        return replace(self, capacity=capacity, shuffle=shuffle, seed=self.seed if seed is None else seed)

    def make(self, chunk: int) -> Made:
        """Read and encode one chunk."""
        start = chunk * self.rows
        chosen = self._rows_at(np.arange(start, start + self.rows))
        items, tallies = self._encode(chosen)
        if self.capacity is None:
            return Made([[item] for item in items], tallies)
        sizes = Examples(items).tree_tokens.tolist()
        return Made([[items[i] for i in bundle] for bundle in pack(sizes, self.capacity)], tallies)

    def __getitem__(self, chunk: int) -> Made:
        # Rust's tokenizer threads do not survive the fork that made this process.
        if _is_worker():
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        return self.make(chunk)

    def held_out(self) -> Examples:
        """The examples of the rows that are kept from training."""
        return Examples(self._encode(self._pairs_of(np.arange(self.skip)))[0])

    def sample(self, most: int = 1000) -> Examples:
        """Examples of the first rows that are trained: what layout and checks are decided on."""
        made = replace(self, rows=min(self.rows, most, self.epoch), capacity=None).make(0)
        for nth, tally in made.tallies.items():
            for remark in tally.remarks:
                log.warning("%s: of the first %s, %s", self.jobs[nth].source.name, f"{tally.rows:,} rows", remark)
        return Examples([item for bundle in made.bundles for item in bundle])

    def _rows_at(self, place: np.ndarray) -> Pairs:
        """(set, row) at places of the endless order."""
        epoch, within = np.divmod(place, self.epoch)
        return self._pairs_of(self.skip + (self._shuffled(epoch, within) if self.shuffle else within))

    def _shuffled(self, epoch: np.ndarray, within: np.ndarray) -> np.ndarray:
        """What stands at these places of these epochs once each block is shuffled."""
        shuffled, blocks = np.empty_like(within), within // self.block
        for nth, block in {*zip(epoch.tolist(), blocks.tolist())}:
            here = (epoch == nth) & (blocks == block)
            first = block * self.block
            order = np.random.default_rng((self.seed, nth, block)).permutation(min(self.block, self.epoch - first))
            shuffled[here] = first + order[within[here] - first]
        return shuffled

    def _pairs_of(self, index: np.ndarray) -> Pairs:
        if self.pairs is None:
            return np.stack([np.zeros_like(index), index], axis=1)
        return self.pairs[index]

    def _encode(self, chosen: Pairs) -> tuple[list[Item], dict[int, Tally]]:
        """Rows as examples, in their order; a row that comes twice is read once."""
        tallies: dict[int, Tally] = {}
        made: dict[tuple[int, int], list[Item]] = {}
        for nth in np.unique(chosen[:, 0]).tolist():
            job = self.jobs[nth]
            found, tally = encode_items(job, (np.unique(chosen[chosen[:, 0] == nth, 1]), None))
            tally.items = len(found)
            tally.supervised = sum(supervised(path) for _, encoded in found for path in encoded.paths)
            tallies[nth] = tally
            for origin, encoded in found:
                name = f"{job.files[origin.file].path}:{origin.number}"
                made.setdefault((nth, origin.row), []).append((encoded, name))
        items = [item for nth, row in chosen.tolist() for item in made.get((nth, row), ())]
        return items, tallies


def _is_worker() -> bool:
    from torch.utils.data import get_worker_info

    return get_worker_info() is not None
