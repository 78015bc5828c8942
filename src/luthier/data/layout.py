"""Layouts: the same answers laid out as padded rows, as packed chains, or as trees that share their beginnings.

A layout changes what is computed, never what is learnt: loss and gradients agree to float error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from luthier.core.tree import Tree, forest, grow_paths
from luthier.core.types import ASIDE, Encoded, Path

if TYPE_CHECKING:
    from luthier.core.batch import Batch

LAYOUTS = ("padded", "packed", "shared")


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """How encoded examples are cut, grouped into micro-batches and laid out."""

    cutoff_len: int = 2048
    """Longest sequence in tokens; longer ones are cut by LLaMA-Factory's rule and counted."""
    layout: str = "auto"
    """auto | padded | packed | shared: how a micro-batch is computed. Same loss, different speed; auto measures
    the data and decides."""
    packing: bool | None = None
    """Fill each row of a micro-batch with several examples, up to cutoff_len tokens; they never see each other.
    Unset: on for pre-training, off otherwise."""
    neat_packing: bool = False
    """The same as packing, which never contaminates here."""


@dataclass(frozen=True)
class _Unit:
    """One tree to be placed in a row, and which answers end in it."""

    tree: Tree
    answers: tuple[tuple[int, Path, np.ndarray], ...]
    """(answer index in the batch, path, the path's nodes in the tree)"""


def collate(items: Sequence[tuple[Encoded, str]], *, layout: str, pad_id: int, columns: Sequence[str] = ()) -> Batch:
    """Lay out encoded examples as one Batch.

    items: (encoded, where it came from). Padded: one row per answer, padded on the right. Packed: one row, every
    answer a chain of its own. Shared: one row, every example one tree. An empty `items` gives a batch with one
    invisible token and nothing supervised, so that a rank without data still takes part in the step.
    """
    answers, aside = _set_aside(items)
    return _collate(answers, layout, pad_id, columns, None if aside is None else _collate(aside, layout, pad_id, ()))


def _set_aside(items: Sequence[tuple[Encoded, str]]):
    """The examples without the paths that are only surveyed; and those paths alone, None if there are none."""
    if not any(path.name.startswith(ASIDE) for encoded, _ in items for path in encoded.paths):
        return items, None
    return tuple(
        [(replace(e, paths=tuple(p for p in e.paths if p.name.startswith(ASIDE) == aside)), name) for e, name in items]
        for aside in (False, True)
    )


def _collate(items, layout: str, pad_id: int, columns: Sequence[str], aside: Batch | None = None) -> Batch:
    units = _units([encoded for encoded, _ in items], layout)
    rows = [[unit] for unit in units] if layout == "padded" else [units] if units else []
    return _Assembly(rows, items, layout, pad_id, columns).batch(aside)


def _units(encoded: Sequence[Encoded], layout: str) -> list[_Unit]:
    units, answer = [], 0
    for example in encoded:
        numbered = [(answer + i, path) for i, path in enumerate(example.paths)]
        answer += len(numbered)
        for together in [numbered] if layout == "shared" and numbered else [[one] for one in numbered]:
            tree, nodes = grow_paths([path for _, path in together])
            units.append(_Unit(tree, tuple((n, path, at) for (n, path), at in zip(together, nodes))))
    return units


class _Assembly:
    """Turns rows of units into the arrays of a Batch."""

    def __init__(self, rows, items, layout: str, pad_id: int, columns: Sequence[str]):
        self.rows: list[list[_Unit]] = rows
        self.items = items
        self.layout = layout
        self.pad_id = pad_id
        self.columns = columns
        forests = [forest([unit.tree for unit in row]) for row in rows]
        self.trees = [tree for tree, _ in forests]
        self.offsets = [offsets for _, offsets in forests]
        self.width = max([len(tree) for tree in self.trees], default=1)

    def batch(self, aside: Batch | None) -> Batch:
        import torch

        from luthier.core.batch import Batch

        ids, position, end, parent = self._token_arrays()
        block = self._blocks()
        edges = self._edge_arrays()
        target, edge = np.unique(edges["node"], return_inverse=True)
        counts = [len(encoded.paths) for encoded, _ in self.items]
        group = np.repeat(np.arange(len(counts)), counts)
        score = np.array([path.score for e, _ in self.items for path in e.paths], np.float64)
        better, worse = _pairs(group, score)
        as_tensor = torch.from_numpy
        return Batch(
            ids=as_tensor(ids),
            position=as_tensor(position),
            end=as_tensor(end),
            target=as_tensor(target),
            source=as_tensor(parent.reshape(-1)[target]),
            edge=as_tensor(edge.reshape(-1)),
            answer=as_tensor(edges["answer"]),
            weight=as_tensor(edges["weight"]),
            last=as_tensor(edges["last"]),
            group=as_tensor(group),
            score=as_tensor(score),
            better=as_tensor(better),
            worse=as_tensor(worse),
            aside=aside,
            columns={name: as_tensor(edges[name]) for name in self.columns},
            segments=_segments(self.trees[0], block[0]) if self.layout != "padded" and self.trees else (),
            block=as_tensor(block) if (block >= 0).any() else None,
            layout=self.layout,
            names=tuple(name for _, name in self.items),
            extras=tuple(encoded.extra for encoded, _ in self.items),
            tokens=sum(len(tree) for tree in self.trees),
            unshared=sum(len(path.ids) for e, _ in self.items for path in e.paths),
        )

    def _token_arrays(self):
        shape = (max(len(self.rows), 1), self.width)
        ids = np.full(shape, self.pad_id, np.int64)
        # Padding goes on counting, so that positions stay inside any model's range as long as the row does; each
        # padded token sees the row before it (harmless) and nothing sees it: real tokens all lie to its left.
        position = np.tile(np.arange(self.width, dtype=np.int64), (shape[0], 1))
        end = np.tile(np.arange(1, self.width + 1, dtype=np.int64), (shape[0], 1))
        parent = np.full(shape, -1, np.int64)
        for row, tree in enumerate(self.trees):
            n = len(tree)
            ids[row, :n], position[row, :n], end[row, :n] = tree.ids, tree.depth, tree.end
            parent[row, :n] = np.where(tree.parent < 0, -1, tree.parent + row * self.width)
        return ids, position, end, parent

    def _blocks(self) -> np.ndarray:
        """int64 [R, T]: the number of the block each token is in, -1 outside of all."""
        block = np.full((max(len(self.rows), 1), self.width), -1, np.int64)
        for row, (units, offsets) in enumerate(zip(self.rows, self.offsets)):
            for unit, offset in zip(units, offsets):
                for n, path, at in unit.answers:
                    if path.block is not None:
                        block[row, at[path.block :] + offset] = n
        return block

    def _edge_arrays(self) -> dict[str, np.ndarray]:
        node, answer, weight = [], [], []
        columns: dict[str, list[np.ndarray]] = {name: [] for name in self.columns}
        last = np.zeros(sum(len(encoded.paths) for encoded, _ in self.items), np.int64)
        for row, (units, offsets) in enumerate(zip(self.rows, self.offsets)):
            for unit, offset in zip(units, offsets):
                for n, path, at in unit.answers:
                    flat = at + offset + row * self.width
                    weights = np.asarray(path.weights, np.float64)
                    # The first token has nothing before it to be predicted from.
                    chosen = np.flatnonzero(weights[1:]) + 1
                    node.append(flat[chosen])
                    answer.append(np.full(len(chosen), n, np.int64))
                    weight.append(weights[chosen])
                    last[n] = flat[-1]
                    for name, values in columns.items():
                        values.append(np.asarray(path.column(name))[chosen])
        return {
            "node": _join(node, np.int64),
            "answer": _join(answer, np.int64),
            "weight": _join(weight, np.float64),
            "last": last,
        } | {name: np.concatenate(values) if values else np.zeros(0) for name, values in columns.items()}


def _pairs(group: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(better, worse) answers of every pair in one group whose scores differ; NaN scores make no pairs."""
    return np.nonzero((group[:, None] == group[None, :]) & (score[:, None] > score[None, :]))


def _join(arrays: list[np.ndarray], dtype) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)


def _segments(tree: Tree, block: np.ndarray) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    """(start, stop, indices of the runs above it) of every unbranched run, in order; a block begins a run."""
    begins = np.flatnonzero(np.diff(block[: len(tree)], prepend=-1))
    bounds = np.union1d(tree.segments[0], begins)
    starts, stops = bounds.tolist(), [*bounds[1:].tolist(), len(tree)]
    above: list[tuple[int, ...]] = []
    for index, start in enumerate(starts):
        parent = int(tree.parent[start])
        # A run hangs on the last token of another run: branches only happen there.
        owner = int(np.searchsorted(starts, parent, side="right")) - 1
        above.append((*above[owner], owner) if parent >= 0 else ())
        assert owner < index
    return tuple(zip(starts, stops, above))
