"""Which examples share a row, and which layout pays: decided from lengths alone."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

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
    padded = 0
    for start in range(0, len(bundles), batch_size):
        members = [i for bundle in bundles[start : start + batch_size] for i in bundle]
        padded += int(longest[members].max() * answers[members].sum()) if members else 0
    shared, plain = int(tree_tokens.sum()), int(path_tokens.sum())
    layout = wish
    if wish == "auto":
        if plain >= SHARE_FROM * shared:
            layout = "shared"
        else:
            layout = "packed" if padded >= PACK_FROM * plain else "padded"
    return Choice(layout, shared, plain, padded)


def pack(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Group items into rows of at most `capacity` tokens, best fit first; an item larger than that has its own row.

    Best-fit decreasing: each item goes to the row it fills best. Rows keep their items in the order of the data,
    and come in the order of their first item, so that the plan depends on nothing but the sizes.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, -row), sorted: the fullest row that still fits comes first
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        place = bisect_left(room, (sizes[item], -len(rows)))
        if place < len(room):
            left, row = room.pop(place)
        else:
            left, row = capacity, -len(rows)
            rows.append([])
        rows[-row].append(item)
        if left - sizes[item] > 0:
            insort(room, (left - sizes[item], row))
    return sorted(sorted(row) for row in rows)
