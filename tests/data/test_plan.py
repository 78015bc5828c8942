"""Packing and the choice of a layout."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.plan import choose_layout, pack


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(8, 32))
def test_every_item_has_one_place_and_no_row_overflows(sizes, capacity):
    rows = pack(sizes, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    for row in rows:
        assert sum(sizes[i] for i in row) <= capacity or len(row) == 1
    assert rows == pack(sizes, capacity)


def test_best_fit():
    # 9+1, 7+3, 5+4 and 2: three full rows and one for the rest.
    sizes = [5, 3, 9, 2, 7, 1, 4]
    filled = sorted(sum(sizes[i] for i in row) for row in pack(sizes, 10))
    assert filled == [2, 9, 10, 10]
    assert len(pack([10, 10, 10], 10)) == 3


@given(st.lists(st.integers(1, 40), max_size=40), st.integers(8, 32))
def test_each_item_goes_to_the_row_it_fills_best(sizes, capacity):
    rows: list[list[int]] = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        left = [capacity - sum(sizes[i] for i in row) - sizes[item] for row in rows]
        fitting = [(room, -nth) for nth, room in enumerate(left) if room >= 0]
        if fitting:
            rows[-min(fitting)[1]].append(item)
        else:
            rows.append([item])
    assert pack(sizes, capacity) == sorted(sorted(row) for row in rows)


def _choice(wish, tree, path, longest, answers, batch=2):
    arrays = {"tree_tokens": tree, "path_tokens": path, "longest": longest, "answers": answers}
    arrays = {name: np.array(values) for name, values in arrays.items()}
    return choose_layout(wish, bundles=[[i] for i in range(len(tree))], batch_size=batch, **arrays)


def test_layout_follows_what_is_saved():
    assert _choice("auto", [60, 60], [100, 100], [50, 50], [2, 2]).layout == "shared"
    assert _choice("auto", [10, 90], [10, 90], [10, 90], [1, 1]).layout == "packed"
    assert _choice("auto", [50, 50], [50, 50], [50, 50], [1, 1]).layout == "padded"
    assert _choice("padded", [60, 60], [100, 100], [50, 50], [2, 2]).layout == "padded"
    assert _choice("auto", [10, 90], [10, 90], [10, 90], [1, 1]).padded_tokens == 180


def test_padded_tokens_of_micro_batches():
    sizes = {name: np.array([30, 10, 20, 40]) for name in ("tree_tokens", "path_tokens", "longest")}
    bundles, answers = [[0, 1], [], [2], [3]], np.array([1, 2, 1, 3])
    # Three answers of 30, none, one of 20 and three of 40; by twos, 3 * 30 and 4 * 40.
    assert choose_layout("auto", bundles=bundles, batch_size=1, answers=answers, **sizes).padded_tokens == 90 + 20 + 120
    assert choose_layout("auto", bundles=bundles, batch_size=2, answers=answers, **sizes).padded_tokens == 90 + 160
