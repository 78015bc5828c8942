"""Rows of data sets that lie on a hub, through `datasets`: stored here, or streamed past."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from luthier.core import hubs
from luthier.core.errors import DataError
from luthier.data.files import File, Row
from luthier.data.source import Source


class Hub(File):
    """A split of a data set from the hub, as `datasets` keeps it."""

    def __init__(self, name: str, data: Any):
        super().__init__(Path(name))
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def take(self, index: Sequence[int]) -> list[Row]:
        columns = self.data[list(index)]
        return [dict(zip(columns, values)) for values in zip(*columns.values())]


class HubStream(File):
    """A split of a data set from the hub, read from its beginning to its end and never stored.

    Rows come nearly in order: `reach` rows before the first of a request may still be asked for, and are held.
    """

    def __init__(self, name: str, data: Any, rows: int, reach: int):
        super().__init__(Path(name))
        self.data, self.rows, self.reach = data, rows, reach
        self._held: dict[int, Row] = {}
        self._coming: Iterator[Row] | None = None
        self._next = 0

    def __len__(self) -> int:
        return self.rows

    def __reduce__(self):
        return HubStream, (str(self.path), self.data, self.rows, self.reach)

    def take(self, index: Sequence[int]) -> list[Row]:
        begin, last = max(min(index, default=0) - self.reach, 0), max(index, default=-1)
        gone = any(i < self._next and i not in self._held for i in index)
        if self._coming is None or gone or begin > self._next:
            # What lies before is skipped where it is stored, without being read.
            self._coming, self._next, self._held = iter(self.data.skip(begin)), begin, {}
        self._held = {i: row for i, row in self._held.items() if i >= begin}
        while self._next <= last:
            row = next(self._coming, None)
            if row is None:
                raise DataError(f"{self.path}: ended after {self._next} rows, and {self.rows} were announced.")
            self._held[self._next] = row
            self._next += 1
        return [self._held[i] for i in index]


def open_hub(source: Source, reach: int | None, access: hubs.Access) -> File:
    """The rows of a data set on a hub; with `reach` as a `HubStream`. Raises DataError, and what `hubs` raises."""
    import datasets

    assert source.hub is not None
    if source.store == "hf":
        name, here = source.hub, {"revision": source.revision, "token": access.tokens.get("hf")}
    else:
        folder = hubs.snapshot(
            source.store, source.hub, kind="dataset", place=source.place, access=access, revision=source.revision
        )
        # It lies here whole, so there is nothing to stream.
        name, here, reach = str(folder), {}, None
    where = {"data_dir": source.folder, "cache_dir": access.cache_dir, "streaming": reach is not None}
    try:
        data = datasets.load_dataset(name, name=source.subset, split=source.split, **where, **here)
    except Exception as error:
        raise DataError(
            f"{source.place}: {source.hub!r} is no local file or folder, and loading it from the hub failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    if reach is not None:
        known = (data.info.splits or {}).get(source.split)
        if known is None or not known.num_examples:
            raise DataError(
                f"{source.place}: the hub does not say how many rows {source.hub} has, which streaming needs to know. "
                "Leave streaming out, or download it as a file."
            )
        return HubStream(str(source.hub), data, known.num_examples, reach)
    if not len(data):
        raise DataError(f"{source.place}: {source.hub} is empty: its split {source.split!r} holds no rows.")
    return Hub(str(source.hub), data)
