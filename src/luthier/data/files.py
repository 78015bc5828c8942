"""Rows of data files, read when asked for: json, jsonl, csv, parquet, arrow, txt, or a folder of one of them.

Nothing is cast to a common type, so rows of one file may differ. Every row knows its file and its number, and what
cannot be read is reported with both.
"""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from luthier.core import hubs
from luthier.core.errors import DataError
from luthier.data.source import Source, excerpt

Row = Mapping[str, Any]
BLANKS = tuple(b" \t\r\v\f")


class File(ABC):
    """The rows of one file. Picklable; readable from several processes."""

    def __init__(self, path: Path):
        self.path = path

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, index: Sequence[int]) -> list[Row]:
        """The rows at these places, in this order; raises DataError where one cannot be read."""

    def number(self, index: int) -> int:
        """What the user calls the row: its line, or its place counted from 1."""
        return index + 1


class _Lines(File):
    """A text file as an index of its lines that are not blank; the text stays on disk."""

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Starts, stops and line numbers."""
        data = np.memmap(self.path, np.uint8, "r") if self.path.stat().st_size else np.zeros(0, np.uint8)
        breaks = [np.flatnonzero(data[at : at + (1 << 24)] == 10) + at for at in range(0, len(data), 1 << 24)]
        stops = np.concatenate([*breaks, [len(data)]]).astype(np.int64)
        starts = np.concatenate([[0], stops[:-1] + 1]).astype(np.int64)
        if data[:3].tobytes() == b"\xef\xbb\xbf":
            starts[0] = 3
        full = np.ones(len(stops), bool)
        # A long line that begins with a blank may be nothing but blanks too.
        blank = np.isin(data[np.minimum(starts, len(data) - 1)], BLANKS) if len(data) else False
        for line in np.flatnonzero((stops - starts <= 64) | blank):
            full[line] = bool(data[starts[line] : stops[line]].tobytes().strip())
        numbers = np.flatnonzero(full)
        return starts[numbers], stops[numbers], numbers + 1

    def __len__(self) -> int:
        return len(self._index[0])

    def number(self, index: int) -> int:
        return int(self._index[2][index])

    def take(self, index: Sequence[int]) -> list[Row]:
        starts, stops, numbers = self._index
        rows = []
        with self.path.open("rb") as file:
            for i in index:
                file.seek(int(starts[i]))
                raw = file.read(int(stops[i] - starts[i]))
                rows.append(self._parse(_decode(raw, f"{self.path}, line {numbers[i]}"), int(numbers[i])))
        return rows

    @abstractmethod
    def _parse(self, text: str, number: int) -> Row: ...


class Txt(_Lines):
    """Every line that is not blank is a document."""

    def _parse(self, text: str, number: int) -> Row:
        return {"text": text.removesuffix("\r")}


class Jsonl(_Lines):
    """Every line that is not blank is a JSON object."""

    def _parse(self, text: str, number: int) -> Row:
        row = parse_json(text, self.path, number)
        if not isinstance(row, dict):
            raise DataError(f"{self.path}, line {number}: expected a JSON object, got {excerpt(row)}.")
        return row


class Json(File):
    """One JSON list of objects, held in memory."""

    def __init__(self, path: Path, rows: list[Row]):
        super().__init__(path)
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, index: Sequence[int]) -> list[Row]:
        return [self._rows[i] for i in index]


class _Table(File):
    """A file that is read group by group: of the rows asked for, one group's worth is in memory."""

    def __init__(self, path: Path, sizes: Sequence[int]):
        super().__init__(path)
        self._ends = np.cumsum(np.asarray(sizes, np.int64))
        self._held: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_held": (-1, None)}

    def take(self, index: Sequence[int]) -> list[Row]:
        rows: list[Row] = []
        at = 0
        while at < len(index):
            group = int(np.searchsorted(self._ends, index[at], side="right"))
            first = int(self._ends[group - 1]) if group else 0
            stop = at
            while stop < len(index) and first <= index[stop] < self._ends[group]:
                stop += 1
            if self._held[0] != group:
                self._held = (group, self._read(group))
            rows += self._held[1].take([i - first for i in index[at:stop]]).to_pylist()
            at = stop
        return rows

    @abstractmethod
    def _read(self, group: int) -> Any:
        """A group as something of pyarrow's that has `take` and `to_pylist`."""


class Parquet(_Table):
    """A parquet file, read by row group."""

    def __init__(self, path: Path):
        from pyarrow import parquet

        with _readable(path, "a parquet"):
            # Kept, since parsing it takes time in proportion to the number of groups.
            self._metadata = parquet.read_metadata(path)
        super().__init__(path, [self._metadata.row_group(i).num_rows for i in range(self._metadata.num_row_groups)])

    def _read(self, group: int) -> Any:
        from pyarrow import parquet

        with _readable(self.path, "a parquet"), parquet.ParquetFile(self.path, metadata=self._metadata) as file:
            return file.read_row_group(group)


class Arrow(_Table):
    """An arrow file or stream, memory-mapped."""

    def __init__(self, path: Path):
        batches = _arrow_batches(path)
        super().__init__(path, [batch.num_rows for batch in batches])
        self._batches: list[Any] | None = batches

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_batches": None}  # another process maps the same file

    def _read(self, group: int) -> Any:
        if self._batches is None:
            self._batches = _arrow_batches(self.path)
        return self._batches[group]


def open_source(source: Source, *, reach: int | None = None, access: hubs.Access = hubs.OPEN) -> list[File]:
    """The files of a data set, in the order of their names. Raises DataError.

    reach: stream what lies on the Hugging Face hub, asked for in an order that goes back at most so many rows.
    """
    if source.path is None:
        from luthier.data.hub import open_hub

        return [open_hub(source, reach, access)]
    paths = _folder_files(source.path / (source.folder or "")) if source.path.is_dir() else [source.path]
    files = [_open(path, source.place) for path in paths]
    if not any(len(file) for file in files):
        raise DataError(f"{source.place}: {source.path} is empty: it holds no rows.")
    return files


def _open(path: Path, place: str) -> File:
    opener = OPENERS.get(path.suffix.lower())
    if opener is None:
        raise DataError(
            f"{place}: {path}: unknown kind of file {path.suffix!r}; expected one of: {', '.join(OPENERS)}."
        )
    try:
        return opener(path)
    except PermissionError:
        raise DataError(f"{place}: {path} cannot be read: permission denied.") from None


def _folder_files(folder: Path) -> list[Path]:
    """Data files of a folder, all of one kind. Of a folder written by `datasets`, its arrow files."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder.")
    if (folder / "state.json").is_file():
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / item["filename"] for item in state["_data_files"]]
    paths = sorted(item for item in folder.iterdir() if item.is_file() and item.suffix.lower() in OPENERS)
    kinds = sorted({path.suffix.lower() for path in paths})
    if len(kinds) > 1:
        raise DataError(
            f"{folder} holds data files of several kinds ({', '.join(kinds)}). Keep one, or name the files."
        )
    if not paths:
        raise DataError(f"{folder} holds no data files. Expected files that end in one of: {', '.join(OPENERS)}.")
    return paths


def _open_json(path: Path) -> File:
    """A JSON list; or JSON lines in a file called .json."""
    text = _decode(path.read_bytes(), str(path)).lstrip("\ufeff")
    if text.lstrip()[:1] == "{" and _is_object(text.strip().partition("\n")[0]):
        return Jsonl(path)
    rows = parse_json(text, path, 1) if text.strip() else []
    if not isinstance(rows, list):
        keys = f" with the keys {', '.join(map(repr, rows))}" if isinstance(rows, dict) else ""
        raise DataError(f"{path}: expected a JSON list of objects, got {excerpt(rows)}{keys}.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: expected a JSON object, got {excerpt(row)}.")
    return Json(path, rows)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _open_csv(path: Path) -> File:
    csv.field_size_limit(2**31 - 1)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        rows: list[Row] = []
        try:
            header = list(reader.fieldnames or [])
            twice = [name for name in header if header.count(name) > 1]
            if twice:
                raise DataError(f"{path}: two columns are called {twice[0]!r}. Give each a name of its own.")
            for row in reader:
                if None in row:
                    raise DataError(
                        f"{path}, row {len(rows) + 1} (line {reader.line_num}): {len(row[None])} more fields than the "
                        f"{len(reader.fieldnames or [])} columns of the header."
                    )
                rows.append(row)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {error}.") from None
        except UnicodeDecodeError as error:
            raise _bad_text(error, str(path)) from None
    return Json(path, rows)


def _arrow_batches(path: Path) -> list[Any]:
    import pyarrow

    with _readable(path, "an arrow"):
        mapped = pyarrow.memory_map(str(path))
        try:
            return pyarrow.ipc.open_stream(mapped).read_all().to_batches()
        except (pyarrow.ArrowInvalid, OSError):
            return pyarrow.ipc.open_file(mapped).read_all().to_batches()


@contextmanager
def _readable(path: Path, kind: str) -> Iterator[None]:
    """Whatever Arrow stumbles over in a broken file, as one DataError."""
    import pyarrow

    try:
        yield
    except PermissionError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not {kind} file, or a broken one: {str(error).splitlines()[0]}") from None


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad_text(error, place) from None


def _bad_text(error: UnicodeDecodeError, place: str) -> DataError:
    byte = error.object[error.start]
    return DataError(f"{place}: not UTF-8 text (byte {byte:#04x} at offset {error.start}). Save the file as UTF-8.")


def parse_json(text: str, path: Path, first_line: int, hook: Callable[[list[Any]], Any] | None = None) -> Any:
    """What a JSON text says; raises DataError with its place. hook: makes an object of its pairs."""
    try:
        return json.loads(text, object_pairs_hook=hook)
    except json.JSONDecodeError as error:
        raise _bad_json(error, text, path, first_line) from None
    except RecursionError:
        raise DataError(f"{path}, line {first_line}: lists and objects are nested too deep to be read.") from None
    except ValueError as error:
        # Numbers of thousands of digits.
        raise DataError(f"{path}, line {first_line}: a value cannot be read: {error}.") from None


def _bad_json(error: json.JSONDecodeError, text: str, path: Path, first_line: int) -> DataError:
    line = first_line + error.lineno - 1
    around = text[max(0, error.pos - 30) : error.pos + 30].replace("\n", " ").strip()
    return DataError(f"{path}, line {line}, column {error.colno}: not valid JSON: {error.msg}, near: {around}")


OPENERS: Mapping[str, Callable[[Path], File]] = {
    ".json": _open_json,
    ".jsonl": Jsonl,
    ".csv": _open_csv,
    ".parquet": Parquet,
    ".arrow": Arrow,
    ".txt": Txt,
}
