"""From data sets to encoded examples on disk: read, encode in batches over processes, count what cannot be used.

files --format.read--> Example --objective.encode--> Encoded --store--> EncodedSet
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from luthier.core.errors import DataError, TemplateError
from luthier.core.objective import Objective
from luthier.core.registry import find
from luthier.core.types import Encoded, Example
from luthier.data.bar import bar
from luthier.data.cache import Printed
from luthier.data.conversation import answered
from luthier.data.files import File, Row
from luthier.data.groups import PLACE, Groups
from luthier.data.processor_template import Seeing
from luthier.data.report import Tally
from luthier.data.source import BadRow, Columns, Source
from luthier.data.store import ITEMS, Origin, supervised, table, write

if TYPE_CHECKING:
    import pyarrow


CHATS = ("openai", "sharegpt")
"""Formats whose rows are conversations, which may end with anybody's turn."""


@runtime_checkable
class Warm(Protocol):
    """A renderer that can tokenise the texts of many examples in one call, ahead of being asked for their ids."""

    def texts(self, example: Example) -> list[str]:
        """What will be tokenised for this example."""

    def warm(self, texts: Sequence[str]) -> None:
        """Tokenise these together."""


@dataclass(frozen=True)
class Job:
    """How the rows of one data set are encoded; handed to every worker once."""

    source: Source
    files: tuple[File, ...]
    objective: Objective
    renderer: Printed
    cutoff_len: int
    groups: Groups | None = None
    """Of a format whose rows belong together."""

    @property
    def columns(self) -> Columns:
        """The resolved columns."""
        assert self.source.columns is not None
        return self.source.columns

    def rows(self, ordinals: np.ndarray) -> Iterator[tuple[Origin, str, Row]]:
        """These rows (ordinals over all files, ascending), each with `file:row`."""
        # Of thousands of files, a chunk's rows lie in few.
        owners = np.searchsorted(self._ends, ordinals, side="right")
        for nth in np.unique(owners).tolist():
            file, first = self.files[nth], int(self._ends[nth - 1]) if nth else 0
            mine = ordinals[owners == nth]
            for ordinal, row in zip(mine.tolist(), file.take((mine - first).tolist())):
                number = file.number(ordinal - first)
                place = f"{file.path}:{number}"
                yield (
                    Origin(ordinal, nth, number),
                    place,
                    row if self.groups is None else self.groups.merged(row, nth, place),
                )

    @cached_property
    def _ends(self) -> np.ndarray:
        """int64 [files]: one past the last row of each file, as ordinals over all files."""
        return np.cumsum([len(file) for file in self.files])

    def read(self, row: Row) -> Example:
        """A row as an Example with as many answers as the stage can take; raises BadRow, DataError for too many."""
        assert self.source.format is not None
        try:
            example = reader(self.source.format)(row, self.columns)
        except RecursionError:
            raise BadRow("lists and objects are nested too deep") from None
        self._check_images(row, example)
        fewest, most = self.objective.answers
        if fewest == 1 and self.source.format in CHATS and self.columns.name("kto_tag") is None:
            example = answered(example)
        if len(example.answers) < fewest:
            raise BadRow(f"brings {_answers(len(example.answers))}, the stage needs {fewest}")
        if most is not None and len(example.answers) > most:
            names = ", ".join(answer.name for answer in example.answers)
            raise DataError(
                f"data set {self.source.name!r} brings {_answers(len(example.answers))} a row ({names}), and stage "
                f"{stage_of(self.objective)} takes {_range(fewest, most)}. Choose the "
                "stage that this data set is meant for"
                + (", or take `ranking: true` away from the data set." if self.columns.ranking else ".")
            )
        return example

    def encode(self, example: Example) -> Sequence[Encoded]:
        """What the objective makes of an example; raises BadRow where nothing is left to train."""
        try:
            found = self.objective.encode(example, self.renderer, cutoff_len=self.cutoff_len)
        except TemplateError as error:
            raise BadRow("the template cannot render it", str(error)) from None
        if isinstance(self.renderer, Seeing):
            found = self.renderer.settle(example, found, cutoff_len=self.cutoff_len)
        if trains_tokens(self.objective):
            found = [encoded for encoded in found if any(supervised(path) for path in encoded.paths)]
        if not found:
            raise BadRow(f"nothing left to train after truncation to cutoff_len={self.cutoff_len}")
        return found

    def _check_images(self, row: Row, example: Example) -> None:
        """Raises DataError where images meet a model that reads text only, BadRow where a format leaves them out."""
        shown = any(message.media for message in example.prompt)
        if shown and not isinstance(self.renderer, Seeing):
            raise DataError(
                f"data set {self.source.name!r} ({self.source.place}) brings images, and this run cannot show them to "
                "the model, which reads text alone. To train on the text alone, say with columns which to read: "
                "columns: {...}."
            )
        named = self.columns.names.get("images")
        if not shown and named is not None and row.get(named):
            raise BadRow("images that the format does not show", f"column {named!r}, format {self.source.format}")


@cache
def reader(name: str) -> Callable[[Row, Columns], Example]:
    """The `read` of a format."""
    return find("formats", name).read


def stage_of(objective: Objective) -> str:
    """The name of a stage."""
    return type(objective).__module__.rpartition(".")[2]


def trains_tokens(objective: Objective) -> bool:
    """Whether an objective trains nothing but tokens, so that an example without weights is of no use to it."""
    return objective.head is None and not objective.columns


def learnt(objective: Objective) -> str:
    """What a stage does to the tokens that carry a weight, in a word for people."""
    return "trained" if trains_tokens(objective) else "labelled" if objective.columns else "judged"


def encode_rows(job: Job, chunk: Chunk) -> tuple[pyarrow.RecordBatch, Tally]:
    """One batch of rows, encoded, and what was counted."""
    items, tally = encode_items(job, chunk)
    batch = table(items, job.objective.columns)
    tally.items = sum(bool(encoded.paths) for _, encoded in items)
    tally.tokens, tally.path_tokens, tally.supervised = (
        int(batch.column(name).to_numpy().sum()) for name in ("tree_tokens", "path_tokens", "supervised")
    )
    return batch, tally


def encode_items(job: Job, chunk: Chunk) -> tuple[list[tuple[Origin, Encoded]], Tally]:
    """The examples made of these rows, and what was counted of the rows."""
    ordinals, leaders = chunk
    tally, read = Tally(rows=len(ordinals)), []
    columns: dict[str, None] = {}
    for origin, place, row in job.rows(ordinals):
        columns.update(dict.fromkeys(name for name in row if name != PLACE))
        try:
            read.append((origin, place, job.read(row)))
        except BadRow as bad:
            tally.blame(bad.reason, _named(place, bad))
    tally.columns = list(columns)
    if isinstance(job.renderer, Warm):
        job.renderer.warm(list(chain.from_iterable(_texts(job.renderer, example) for _, _, example in read)))
    items: list[tuple[Origin, Encoded]] = []
    for origin, place, example in read:
        try:
            found = job.encode(example)
        except BadRow as bad:
            tally.blame(bad.reason, _named(place, bad))
            continue
        except Exception as error:
            error.add_note(f"while encoding {place}")
            raise
        items += [(origin, encoded) for encoded in found]
        tally.unserved_rows += job.objective.unserved(example, job.renderer)
        cut = sum(encoded.truncated for encoded in found)
        tally.truncated_rows += cut > 0
        tally.truncated_tokens += cut
    if leaders is not None:
        items, tally.idle_rows = _gather(job, items, dict(zip(ordinals.tolist(), leaders.tolist())))
    return items, tally


def _gather(
    job: Job, items: Sequence[tuple[Origin, Encoded]], leaders: dict[int, int]
) -> tuple[list[tuple[Origin, Encoded]], int]:
    """The rows of each group as the stage trains them, under the origin of the group's first row that can be used.

    Also the number of rows that are as they should be and bring nothing to train.
    """
    groups: dict[int, list[tuple[Origin, Encoded]]] = {}
    for origin, encoded in items:
        groups.setdefault(leaders[origin.row], []).append((origin, encoded))
    found: list[tuple[Origin, Encoded]] = []
    for leader, members in sorted(groups.items()):
        # A group is found under its leader, also where that row itself cannot be used.
        first = replace(members[0][0], row=leader)
        trees = job.objective.gather([encoded for _, encoded in members])
        found += [(first, encoded) for encoded in trees]
    return found, sum(not encoded.paths for _, encoded in items)


Chunk = tuple[np.ndarray, np.ndarray | None]
"""Ordinals of rows, ascending; and the leader of each, where rows belong together."""


def _chunks(ordinals: np.ndarray, leaders: np.ndarray | None, size: int) -> list[Chunk]:
    """At most `size` rows each, groups kept whole, in the order of the groups."""
    if leaders is None:
        return [(ordinals[at : at + size], None) for at in range(0, len(ordinals), size)]
    order = np.argsort(leaders, kind="stable")
    begins = np.flatnonzero(np.diff(leaders[order], prepend=-1))
    ends = [*begins[1:].tolist(), len(order)]
    chunks, start = [], 0
    for nth, end in enumerate(ends):
        if nth + 1 == len(ends) or ends[nth + 1] - start > size:
            mine = np.sort(order[start:end])
            chunks.append((ordinals[mine], leaders[mine]))
            start = end
    return chunks


def encode_source(
    job: Job, ordinals: np.ndarray, leaders: np.ndarray | None, folder: Path, *, batch_size: int, workers: int
) -> Tally:
    """Encode rows into `folder`; the same bytes for any number of workers."""
    chunks = _chunks(ordinals, leaders, batch_size)
    total = Tally()

    def batches(encoded: Iterable[tuple[pyarrow.RecordBatch, Tally]]) -> Iterator[pyarrow.RecordBatch]:
        for batch, tally in bar(encoded, f"Encoding {job.source.name}", len(ordinals), lambda made: made[1].rows):
            total.add(tally)
            yield batch

    schema = table([], job.objective.columns).schema
    if min(workers, len(chunks)) <= 1:
        write(batches(encode_rows(job, chunk) for chunk in chunks), schema, folder / ITEMS)
        return total
    # Forked workers share the tokenizer and rows held in memory; elsewhere both are sent to each worker once.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(min(workers, len(chunks)), context, _start_worker, (job,)) as pool:
        try:
            write(batches(pool.map(_work, chunks)), schema, folder / ITEMS)
        except BrokenProcessPool:
            raise DataError(
                f"a process encoding {job.source.name!r} died, most likely for want of memory. Lower "
                "preprocessing_num_workers or preprocessing_batch_size."
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return total


_job: list[Job] = []


def _start_worker(job: Job) -> None:
    # One process per core already: threads of the tokenizer would only fight, and do not survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _job[:] = [job]


def _work(chunk: Chunk) -> tuple[pyarrow.RecordBatch, Tally]:
    return encode_rows(_job[0], chunk)


def _texts(renderer: Warm, example: Example) -> list[str]:
    try:
        return renderer.texts(example) if example.answers else ["".join(part.content for part in example.prompt)]
    except TemplateError:
        return []  # Encoding this example raises the same error, and the row is counted there.


def _named(place: str, bad: BadRow) -> str:
    return f"{place} ({bad.detail})" if bad.detail else place


def _range(fewest: int, most: int) -> str:
    if most == 0:
        return "none: it reads data sets of another format"
    return str(most) if most == fewest else f"{fewest} to {most}"


def _answers(count: int) -> str:
    return "no answer" if not count else "1 answer" if count == 1 else f"{count} answers"
