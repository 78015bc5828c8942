"""Encoded examples on disk: one Arrow file per data set, memory-mapped, and sets that are indices into such files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.core.tree import grow_paths
from luthier.core.types import Column, Encoded
from luthier.core.types import Path as TokenPath

if TYPE_CHECKING:
    import pyarrow

ITEMS = "items.arrow"
META = "meta.json"
NUMBERS = ("row", "file", "number", "answers", "tree_tokens", "path_tokens", "longest", "supervised")


@dataclass(frozen=True, slots=True)
class Origin:
    """Which row an example was made of."""

    row: int
    """Ordinal in its data set, over all files."""
    file: int
    """Ordinal of its file."""
    number: int
    """What the user calls the row: its line, or its place counted from 1."""


def table(items: Sequence[tuple[Origin, Encoded]], columns: Sequence[Column]) -> pyarrow.RecordBatch:
    """Encoded examples as one Arrow batch. Raises ValueError for ill-formed ones."""
    import pyarrow as pa

    for _, encoded in items:
        _check(encoded, columns)
    names = [column.name for column in columns]
    paths = [encoded.paths for _, encoded in items]
    # What a path has in common with the one before it is stored once: hundreds may leave one long trunk.
    kept = [[_common(each, nth, names) for nth in range(len(each))] for each in paths]

    def rest(values: Callable[[TokenPath], Sequence[float]], kind: pyarrow.DataType) -> pyarrow.Array:
        return _nested([[values(p)[k:] for p, k in zip(each, start)] for each, start in zip(paths, kept)], kind)

    fields: dict[str, Any] = {
        "kept": pa.array(kept, pa.list_(pa.int32())),
        "ids": rest(lambda path: path.ids, pa.int32()),
        "weights": rest(lambda path: path.weights, pa.float32()),
        "names": pa.array([[path.name for path in each] for each in paths], pa.list_(pa.string())),
        "scores": pa.array([[path.score for path in each] for each in paths], pa.list_(pa.float64())),
        "blocks": pa.array([[path.block for path in each] for each in paths], pa.list_(pa.int32())),
        "truncated": pa.array([encoded.truncated for _, encoded in items], pa.int64()),
        "extra": pa.array([json.dumps(dict(encoded.extra)) for _, encoded in items], pa.string()),
    }
    for column in columns:
        kind = pa.from_numpy_dtype(np.dtype(column.dtype))
        fields[f"column:{column.name}"] = rest(lambda path, name=column.name: path.column(name), kind)
    counts = np.array([(o.row, o.file, o.number, *measure(e)) for o, e in items], np.int64).reshape(-1, len(NUMBERS))
    fields |= {name: pa.array(counts[:, nth]) for nth, name in enumerate(NUMBERS)}
    return pa.RecordBatch.from_pydict(fields)


def write(batches: Iterable[pyarrow.RecordBatch], schema: pyarrow.Schema, file: Path) -> None:
    """Batches as an Arrow file."""
    import pyarrow as pa

    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


class Store:
    """The encoded examples of one data set. Picklable: another process maps the same file."""

    def __init__(self, folder: Path, files: Sequence[str]):
        self.folder = folder
        self.files = tuple(files)
        """Names of the files the rows came from, for messages; the content is stored without them."""

    def __reduce__(self):
        return Store, (self.folder, self.files)

    @cached_property
    def meta(self) -> dict[str, Any]:
        """What the encoding of the set counted, and the parts of its key."""
        return json.loads((self.folder / META).read_text(encoding="utf-8"))

    @cached_property
    def _batches(self) -> list[pyarrow.RecordBatch]:
        import pyarrow as pa

        reader = pa.ipc.open_file(pa.memory_map(str(self.folder / ITEMS)))
        return [reader.get_batch(nth) for nth in range(reader.num_record_batches)]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)

    @cached_property
    def numbers(self) -> dict[str, np.ndarray]:
        """int64 [items] each: the origin; answers; tokens of the tree, of all paths, of the longest; supervised."""
        none = np.zeros(0, np.int64)
        return {
            name: np.concatenate([none, *(batch.column(name).to_numpy() for batch in self._batches)])
            for name in NUMBERS
        }

    def origin(self, item: int) -> str:
        """`file:row` of an item."""
        return f"{self.files[self.numbers['file'][item]]}:{self.numbers['number'][item]}"

    def spans(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First item and number of items of each of these rows, int64 each; 0 items where a row could not be used."""
        first = np.searchsorted(self.numbers["row"], rows, side="left")
        return first, np.searchsorted(self.numbers["row"], rows, side="right") - first

    def __getitem__(self, item: int) -> Encoded:
        which = int(np.searchsorted(self._ends, item, side="right"))
        batch = self._batches[which]
        at = item - (int(self._ends[which - 1]) if which else 0)
        kept = batch.column("kept")[at].as_py()
        ids = _lists(batch.column("ids"), at, kept)
        weights = _lists(batch.column("weights"), at, kept)
        names = batch.column("names")[at].as_py()
        scores = batch.column("scores")[at].as_py()
        blocks = batch.column("blocks")[at].as_py()
        columns: list[dict[str, list[float]]] = [{} for _ in ids]
        for name in batch.schema.names:
            if name.startswith("column:"):
                for path, values in zip(columns, _lists(batch.column(name), at, kept)):
                    path[name.removeprefix("column:")] = values
        return Encoded(
            tuple(TokenPath(*parts) for parts in zip(ids, weights, names, scores, columns, blocks)),
            batch.column("truncated")[at].as_py(),
            json.loads(batch.column("extra")[at].as_py()),
        )


class EncodedSet:
    """Encoded examples in the order of a run: indices into stores. `[i]` is (Encoded, "file:row"). Picklable."""

    def __init__(self, stores: Sequence[Store], which: np.ndarray, item: np.ndarray):
        self.stores = tuple(stores)
        self.which = np.asarray(which, np.int32)
        """int32 [N]: the store of each example."""
        self.item = np.asarray(item, np.int64)
        """int64 [N]: its place there."""

    def __len__(self) -> int:
        return len(self.item)

    def __getitem__(self, index: int) -> tuple[Encoded, str]:
        store, item = self.stores[self.which[index]], int(self.item[index])
        return store[item], store.origin(item)

    def row(self, index: int) -> int:
        """The ordinal of an example's row in its data set, counted from 0."""
        return int(self.stores[self.which[index]].numbers["row"][self.item[index]])

    @cached_property
    def trained(self) -> EncodedSet:
        """The examples that bring anything to train; the others are for what is measured of whole requests."""
        used = self.answers > 0
        return self if used.all() else EncodedSet(self.stores, self.which[used], self.item[used])

    @cached_property
    def answers(self) -> np.ndarray:
        """int64 [N]: paths of each example."""
        return self._gather("answers")

    @cached_property
    def tree_tokens(self) -> np.ndarray:
        """int64 [N]: tokens of each example with shared beginnings counted once."""
        return self._gather("tree_tokens")

    @cached_property
    def path_tokens(self) -> np.ndarray:
        """int64 [N]: tokens of all paths of each example."""
        return self._gather("path_tokens")

    @cached_property
    def longest(self) -> np.ndarray:
        """int64 [N]: tokens of the longest path of each example."""
        return self._gather("longest")

    @cached_property
    def supervised(self) -> np.ndarray:
        """int64 [N]: supervised tokens of each example, over all paths."""
        return self._gather("supervised")

    @cached_property
    def fingerprint(self) -> str:
        """Changes when any example or their order does."""
        state = hashlib.sha256(json.dumps([store.meta["key"] for store in self.stores]).encode())
        state.update(self.which.tobytes())
        state.update(self.item.tobytes())
        return state.hexdigest()

    def _gather(self, name: str) -> np.ndarray:
        gathered = np.zeros(len(self), np.int64)
        for nth, store in enumerate(self.stores):
            mine = self.which == nth
            gathered[mine] = store.numbers[name][self.item[mine]]
        return gathered


def _nested(values: Sequence[Sequence[Sequence[float]]], kind: pyarrow.DataType) -> pyarrow.Array:
    """list<list<kind>> built from flat numpy arrays: much faster than from Python lists of lists."""
    import pyarrow as pa

    inner = [item for each in values for item in each]
    flat = np.concatenate([np.zeros(0), *inner]) if inner else np.zeros(0)
    starts = np.cumsum([0, *map(len, inner)], dtype=np.int32)
    outer = np.cumsum([0, *map(len, values)], dtype=np.int32)
    lists = pa.ListArray.from_arrays(starts, pa.array(flat.astype(kind.to_pandas_dtype()), kind))
    return pa.ListArray.from_arrays(outer, lists)


def _common(paths: Sequence[TokenPath], nth: int, columns: Sequence[str]) -> int:
    """How many leading tokens of a path are as in the path before it: ids, weights and columns."""
    if not nth:
        return 0
    before, path = paths[nth - 1], paths[nth]
    n = min(len(before.ids), len(path.ids))
    pairs = [(before.ids, path.ids), (before.weights, path.weights)]
    for a, b in [*pairs, *((before.column(name), path.column(name)) for name in columns)]:
        one, other = np.asarray(a[:n]), np.asarray(b[:n])
        differs = np.flatnonzero((one != other) & ~((one != one) & (other != other)))  # NaN is as NaN here
        n = int(differs[0]) if len(differs) else n
    return n


def _lists(column: pyarrow.ListArray, at: int, kept: Sequence[int]) -> list[list[Any]]:
    """One row of list<list<number>>, each list after the first `kept` numbers of the one before it."""
    inner = column.values
    first, last = column.offsets[at].as_py(), column.offsets[at + 1].as_py()
    edges = inner.offsets.slice(first, last - first + 1).to_numpy()
    flat = inner.values.slice(edges[0], edges[-1] - edges[0]).to_numpy()
    found: list[list[Any]] = []
    for a, b, common in zip(edges[:-1], edges[1:], kept):
        rest = flat[a - edges[0] : b - edges[0]].tolist()
        found.append([*found[-1][:common], *rest] if common else rest)
    return found


def measure(encoded: Encoded) -> tuple[int, int, int, int, int]:
    """Answers; tokens of the tree, of all paths, of the longest; supervised: as `NUMBERS` has them."""
    lengths = [len(path.ids) for path in encoded.paths]
    shared = len(grow_paths(encoded.paths)[0]) if len(lengths) > 1 else sum(lengths)
    return len(lengths), shared, sum(lengths), max(lengths, default=0), sum(supervised(path) for path in encoded.paths)


def supervised(path: TokenPath) -> int:
    """Tokens of a path that are trained; the first never is."""
    return int(np.count_nonzero(np.asarray(path.weights[1:]) > 0))


def _check(encoded: Encoded, columns: Sequence[Column]) -> None:
    declared = {column.name for column in columns}
    for path in encoded.paths:
        lengths = {"weights": len(path.weights)} | {name: len(values) for name, values in path.columns.items()}
        wrong = [f"{name} has {length}" for name, length in lengths.items() if length != len(path.ids)]
        if wrong or not path.ids:
            raise ValueError(
                f"path {path.name!r} has {len(path.ids)} ids, but {', '.join(wrong) or 'needs at least one'}"
            )
        undeclared = sorted(set(path.columns) - declared)
        if undeclared:
            raise ValueError(f"path {path.name!r} brings columns that the objective does not declare: {undeclared}")
