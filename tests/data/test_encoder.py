"""Which files the rows of a chunk are read from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from luthier.data.encoder import Job
from luthier.data.files import File
from luthier.data.source import Source
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
