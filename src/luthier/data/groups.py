"""Rows that belong together, and the file beside them that says what they have in common.

A format declares `JOIN = Join(key, sibling)`. Rows with the same key are then encoded one by one, gathered into
examples by the stage (`Objective.gather`), and never parted by a split: the unit of mixing and holding out is the
group. Of the sibling file, the row with the same key is merged into each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from luthier.core.errors import DataError
from luthier.core.log import get_logger
from luthier.data.files import File, Jsonl, Row

log = get_logger("data")

PLACE = "luthier:place"
"""Name under which a joined row is told where it came from: file and line."""
BLOCK = 1000


@dataclass(frozen=True)
class Join:
    """How the rows of a format belong together."""

    key: str
    """The column whose value rows of one group share; compared as text."""
    sibling: str
    """Name of the JSON lines file, beside each data file, whose rows are merged in by the same key."""


@dataclass(frozen=True)
class Groups:
    """The groups of one data set."""

    join: Join
    siblings: tuple[Mapping[str, Row], ...]
    """For each data file, the sibling's rows by key."""

    def merged(self, row: Row, file: int, place: str) -> Row:
        """A row with what its group has in common, and its place; the row's own columns win."""
        return {**self.siblings[file].get(key_of(row, self.join.key), {}), **row, PLACE: place}


def join_of(module: ModuleType) -> Join | None:
    """How a format's rows belong together, if they do."""
    return vars(module).get("JOIN")


def key_of(row: Row, key: str) -> str:
    """The key of a row as text."""
    return str(row.get(key, ""))


def open_groups(join: Join, files: Sequence[File], place: str) -> Groups:
    """Read the sibling files. Raises DataError where one is missing or says two things about one key."""
    read: dict[Path, Mapping[str, Row]] = {}
    for file in files:
        sibling = sibling_of(join, file)
        if sibling not in read:
            read[sibling] = _read(join, sibling, file, place)
    return Groups(join, tuple(read[sibling_of(join, file)] for file in files))


def sibling_of(join: Join, file: File) -> Path:
    """Where a data file's sibling lies."""
    return file.path.parent / join.sibling


def _read(join: Join, sibling: Path, file: File, place: str) -> Mapping[str, Row]:
    if not sibling.is_file():
        raise DataError(
            f"{place}: {sibling} does not exist. The rows of {file.path.name} get what they have in common from a "
            f"{join.sibling} in the same folder: JSON lines with the same {join.key}."
        )
    rows = Jsonl(sibling)
    found: dict[str, Row] = {}
    for index, row in _rows(rows):
        name = key_of(row, join.key)
        if join.key not in row:
            raise DataError(f"{sibling}, line {rows.number(index)}: has no {join.key!r}.")
        common = {column: value for column, value in row.items() if column != join.key}
        if found.setdefault(name, common) != common:
            raise DataError(
                f"{sibling}, line {rows.number(index)}: {join.key} {name!r} was there before, with other content. "
                "Give each request a key of its own."
            )
    log.info("Loaded %d context entries from %s.", len(found), sibling.name)
    return found


def leaders(files: Sequence[File], key: str, used: np.ndarray) -> np.ndarray:
    """For each used row (ordinals over all files, ascending), the first used row of its group; int64 [rows].

    A key means the same group in all files of a data set that lie in one folder.
    """
    first: dict[tuple[Path, str], int] = {}
    found = np.empty(len(used), np.int64)
    start = at = 0
    for file in files:
        mine = used[(used >= start) & (used < start + len(file))]
        for ordinal, row in zip(mine.tolist(), _taken(file, (mine - start).tolist())):
            found[at] = first.setdefault((file.path.parent, key_of(row, key)), ordinal)
            at += 1
        start += len(file)
    return found


def _taken(file: File, index: Sequence[int]) -> Iterator[Row]:
    for at in range(0, len(index), BLOCK):
        yield from file.take(index[at : at + BLOCK])


def _rows(file: File) -> Iterator[tuple[int, Row]]:
    return zip(range(len(file)), _taken(file, range(len(file))))
