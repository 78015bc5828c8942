"""Which examples share a row, and which layout pays: decided from lengths alone."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import chain

import numpy as np

SHARE_FROM = 1.1
"""Sharing is worth its segments when it saves at least this factor of tokens."""
PACK_FROM = 1.05
"""Packing is worth its masks when padding costs at least this factor."""


@dataclass(frozen=True)
class Choice:
    """A layout and the figures that speak for it."""

    layout: str
    tree_tokens: int
    path_tokens: int
    padded_tokens: int

    def reason(self) -> str:
        """One line for the log."""
        return (
            f"layout: {self.layout} (tokens to compute per epoch: shared {self.tree_tokens:,}, "
            f"packed {self.path_tokens:,}, padded {self.padded_tokens:,})"
        )


def choose_layout(
    wish: str,
    *,
    tree_tokens: np.ndarray,
    path_tokens: np.ndarray,
    longest: np.ndarray,
    answers: np.ndarray,
    bundles: Sequence[Sequence[int]],
    batch_size: int,
) -> Choice:
    """The layout a run computes in: the user's wish, or the cheapest by tokens.

    All arrays have one entry per example. Padded tokens are estimated with `batch_size` bundles per micro-batch in
    the order given, every answer a row.
    """
    padded = _padded_tokens(bundles, longest, answers, batch_size)
    shared, plain = int(tree_tokens.sum()), int(path_tokens.sum())
    layout = wish
    if wish == "auto":
        if plain >= SHARE_FROM * shared:
            layout = "shared"
        else:
            layout = "packed" if padded >= PACK_FROM * plain else "padded"
    return Choice(layout, shared, plain, padded)


def _padded_tokens(bundles: Sequence[Sequence[int]], longest: np.ndarray, answers: np.ndarray, batch_size: int) -> int:
    """Answers times the longest path, summed over the micro-batches."""
    members = np.fromiter(chain.from_iterable(bundles), np.int64)
    batch = np.repeat(np.arange(len(bundles)) // batch_size, [len(bundle) for bundle in bundles])
    width, rows = np.zeros((2, -(-len(bundles) // batch_size)), np.int64)
    np.maximum.at(width, batch, longest[members])
    np.add.at(rows, batch, answers[members])
    return int(width @ rows)


def pack(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Group items into rows of at most `capacity` tokens, best fit first; an item larger than that has its own row.

    Best-fit decreasing: each item goes to the row it fills best. Rows keep their items in the order of the data,
    and come in the order of their first item, so that the plan depends on nothing but the sizes.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    """How many tokens rows have left, each number once, ascending: there are at most `capacity` of them."""
    rows_with: dict[int, list[int]] = {}
    """Tokens left -> the rows that have so many left, as a heap of negative numbers: the latest row first."""
    for item in np.argsort(-np.asarray(sizes), kind="stable").tolist():
        place = bisect_left(room, sizes[item])
        if place < len(room):
            left = room[place]
            row = -heappop(rows_with[left])
            if not rows_with[left]:
                del room[place]
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        left -= sizes[item]
        if left > 0:
            fitting = rows_with.setdefault(left, [])
            if not fitting:
                insort(room, left)
            heappush(fitting, -row)
    return sorted(sorted(row) for row in rows)
