"""Token trees: sequences that begin alike, stored once.

A tree is two integer arrays in depth-first order, `ids` and `parent`. Everything else follows:

    depth[t]   position of token t                           depth[parent[t]] + 1, or 0 at a root
    end[t]     one past t's last descendant                  token q sees token k  <=>  k <= q < end[k]

Several trees side by side are a forest, and the same rule keeps them apart. A chain is a tree without branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

import numpy as np

from luthier.core.types import Path

Ints = np.ndarray


@dataclass(frozen=True)
class Tree:
    """A forest of tokens in depth-first order.

    ids: int32 [T] token ids; parent: int32 [T] index of the token before this one on its path, -1 at a root.
    """

    ids: Ints
    parent: Ints

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def depth(self) -> Ints:
        """int32 [T]: how many tokens come before this one on its path; its position in the unshared sequence."""
        starts, stops = self.segments
        depth = np.empty(len(self), np.int32)
        for start, stop in zip(starts.tolist(), stops.tolist()):
            above = self.parent[start]
            first = 0 if above < 0 else depth[above] + 1
            depth[start:stop] = np.arange(first, first + stop - start, dtype=np.int32)
        return depth

    @cached_property
    def end(self) -> Ints:
        """int32 [T]: one past the last descendant. The subtree of t is the interval [t, end[t])."""
        starts, stops = self.segments
        end = np.empty(len(self), np.int32)
        for start, stop in zip(reversed(starts.tolist()), reversed(stops.tolist())):
            # A segment's tail has all its child segments to its right, and the last of them ends last.
            end[start:stop] = max(stop, self._last_child_end(stop - 1, stop, end))
        return end

    def _last_child_end(self, tail: int, start: int, end: Ints) -> int:
        reach = start
        while reach < len(self) and self.parent[reach] == tail:
            reach = int(end[reach])
        return reach

    @cached_property
    def segments(self) -> tuple[Ints, Ints]:
        """Starts and stops of the unbranched runs, in order: int [S], int [S]. Attention is computed run by run."""
        if not len(self):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        index = np.arange(len(self))
        continues = self.parent == index - 1
        children = np.bincount(self.parent[self.parent >= 0], minlength=len(self))
        continues[1:] &= children[:-1] == 1
        continues[0] = False
        starts = np.flatnonzero(~continues)
        return starts, np.append(starts[1:], len(self))


def grow_paths(paths: Sequence[Path]) -> tuple[Tree, list[Ints]]:
    """`grow` for paths, whose blocks stay their own."""
    return grow([path.ids for path in paths], [path.block for path in paths])


def grow(paths: Sequence[Sequence[int]], own: Sequence[int | None] = ()) -> tuple[Tree, list[Ints]]:
    """Insert sequences into a trie; from index `own[p]` on, path p shares nothing (None: it shares what it can).

    Returns the tree and, for each path, the node of each of its tokens (int [len(path)], root first), so that
    `tree.ids[nodes[p]]` is path p again. Children keep the order in which they first appeared.
    """
    root = _Run(np.zeros(0, np.int32))
    tails = [root.add(np.asarray(path, np.int32), alone) for path, alone in zip_longest(paths, own)]
    ids: list[Ints] = []
    parent: list[Ints] = []
    total = 0
    stack = [(child, -1) for child in reversed(root.children)]
    while stack:
        run, above = stack.pop()
        run.start = total
        ids.append(run.ids)
        up = np.arange(total - 1, total + len(run.ids) - 1, dtype=np.int32)
        up[0] = above
        parent.append(up)
        total += len(run.ids)
        stack.extend((child, total - 1) for child in reversed(run.children))
    empty = np.zeros(0, np.int32)
    tree = Tree(np.concatenate(ids) if ids else empty, np.concatenate(parent) if parent else empty)
    return tree, [path_to(tree, run.start + len(run.ids) - 1 if len(run.ids) else -1) for run in tails]


def path_to(tree: Tree, node: int) -> Ints:
    """The nodes from the root to `node`, int64 [depth + 1]."""
    pieces: list[Ints] = []
    starts, _ = tree.segments
    while node >= 0:
        start = int(starts[np.searchsorted(starts, node, side="right") - 1])
        pieces.append(np.arange(start, node + 1))
        node = int(tree.parent[start])
    return np.concatenate(pieces[::-1]) if pieces else np.zeros(0, np.int64)


def forest(trees: Sequence[Tree]) -> tuple[Tree, list[int]]:
    """Trees side by side in one row; also the offset at which each begins."""
    offsets, total = [], 0
    for tree in trees:
        offsets.append(total)
        total += len(tree)
    if not trees:
        empty = np.zeros(0, np.int32)
        return Tree(empty, empty), []
    ids = np.concatenate([tree.ids for tree in trees])
    parent = np.concatenate(
        [np.where(tree.parent < 0, -1, tree.parent + offset) for tree, offset in zip(trees, offsets)]
    ).astype(np.int32)
    return Tree(ids, parent), offsets


class _Run:
    """A piece of a trie without branches; mutable only while it grows. Its last token never changes."""

    def __init__(self, ids: Ints, alone: bool = False):
        self.ids = ids
        self.alone = alone
        """No other sequence comes in here."""
        self.children: list[_Run] = []
        self.start = -1

    def add(self, path: Ints, alone: int | None) -> _Run:
        """Insert a sequence whose tokens from `alone` on are its own; returns the run that ends where it ends."""
        above = self.insert(path[:alone])
        if alone is None or alone >= len(path):
            return above
        above.children.append(_Run(path[alone:], alone=True))
        return above.children[-1]

    def insert(self, path: Ints) -> _Run:
        """Add a sequence below this run; returns the run that ends where the sequence ends."""
        here: _Run = self
        while len(path):
            slot = next((i for i, c in enumerate(here.children) if c.ids[0] == path[0] and not c.alone), None)
            if slot is None:
                here.children.append(_Run(path))
                return here.children[-1]
            child = here.children[slot]
            common = _common_prefix(child.ids, path)
            if common < len(child.ids):
                upper = _Run(child.ids[:common])
                upper.children, child.ids = [child], child.ids[common:]
                here.children[slot] = child = upper
            here, path = child, path[common:]
        return here


def _common_prefix(a: Ints, b: Ints) -> int:
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n
