"""Which rows make a chunk, which files they are read from, and what of them is stored once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from luthier.core.types import NAN, Column, Encoded
from luthier.core.types import Path as TokenPath
from luthier.data.encoder import Job, _chunks
from luthier.data.files import File
from luthier.data.source import Source
from luthier.data.store import Origin, table
from luthier.objectives.sft import Sft


class Rows(File):
    """Rows that say their file and place; remembers what it was asked for."""

    def __init__(self, name, count):
        super().__init__(Path(name))
        self.count, self.asked = count, []

    def __len__(self):
        return self.count

    def take(self, index):
        self.asked.append(list(index))
        return [{"row": f"{self.path} {i}"} for i in index]


@pytest.mark.parametrize(
    ("ordinals", "asked"),
    [
        ([0, 2], {"a": [[0, 2]]}),
        ([2, 3, 7], {"a": [[2]], "c": [[0]], "d": [[2]]}),
        ([], {}),
        (range(8), {"a": [[0, 1, 2]], "c": [[0, 1]], "d": [[0, 1, 2]]}),
    ],
)
def test_only_files_that_hold_the_rows_are_opened(ordinals, asked):
    """Of thousands of files, each chunk would otherwise open every one."""
    files = tuple(Rows(name, count) for name, count in (("a", 3), ("b", 0), ("c", 2), ("d", 3)))
    job = Job(Source(name="it", place="dataset"), files, Sft(), None, 10)
    found = list(job.rows(np.array(ordinals, np.int64)))
    assert {file.path.name: file.asked for file in files if file.asked} == asked
    assert [origin.row for origin, _, _ in found] == list(ordinals)
    assert [row["row"] for _, _, row in found] == [f"{name} {i}" for name in asked for i in asked[name][0]]
    assert [place for _, place, _ in found] == [f"{name}:{i + 1}" for name in asked for i in asked[name][0]]


def test_groups_stay_whole_and_fill_chunks():
    # Groups of 2, 3, 1 and 5 rows, a row of each in turn.
    leaders = np.array([0, 1, 2, 3, 0, 1, 3, 1, 3, 3, 3])
    chunks = _chunks(np.arange(100, 111), leaders, 5)
    assert [(ordinals - 100).tolist() for ordinals, _ in chunks] == [[0, 1, 4, 5, 7], [2], [3, 6, 8, 9, 10]]
    assert [chunk[1].tolist() for chunk in chunks] == [[0, 1, 0, 1, 1], [2], [3] * 5]
    (alone,) = _chunks(np.arange(3), np.zeros(3, np.int64), 2)
    assert alone[0].tolist() == [0, 1, 2], "a group larger than a chunk is one"


def test_what_nobody_scored_is_as_equal_as_what_is_scored_alike():
    column = Column("score", "float64")
    paths = tuple(TokenPath([5, 6, 7, last], [0.0] * 4, columns={"score": [NAN, NAN, 0.5, NAN]}) for last in (8, 9))
    assert table([(Origin(0, 0, 1), Encoded(paths))], [column]).column("kept").to_pylist() == [[0, 3]]
