"""Orders of rows, held against `datasets`, which LLaMA-Factory mixes and splits with."""

from __future__ import annotations

from collections import Counter

import datasets
import numpy as np
import pytest

from luthier.core.errors import ConfigError, DataError
from luthier.data.mix import mix, select, split

STOPPING = {
    "interleave_under": "first_exhausted",
    "interleave_over": "all_exhausted",
    "interleave_once": "all_exhausted_without_replacement",
}


def sets(lengths):
    return [datasets.Dataset.from_dict({"which": [s] * n, "row": range(n)}) for s, n in enumerate(lengths)]


def as_pairs(data):
    return list(zip(data["which"], data["row"]))


def tuples(pairs):
    return [tuple(pair) for pair in pairs.tolist()]


@pytest.mark.parametrize("strategy", STOPPING)
@pytest.mark.parametrize("probabilities", [None, [0.2, 0.5, 0.3]])
@pytest.mark.parametrize("lengths", [[3, 4, 5], [700, 900, 40], [5, 5, 5]])
def test_interleaving(strategy, probabilities, lengths):
    expected = datasets.interleave_datasets(
        sets(lengths), probabilities=probabilities, seed=11, stopping_strategy=STOPPING[strategy]
    )
    assert tuples(mix(lengths, strategy, probabilities=probabilities, seed=11)) == as_pairs(expected)


def test_concatenating():
    assert tuples(mix([2, 3], "concat", seed=0)) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]


def test_weights_when_concatenating():
    pairs = mix([10, 4, 6], "concat", weights=[2.5, None, 0.5], seed=3)
    counts = Counter(tuples(pairs))
    first = sorted(counts[0, row] for row in range(10))
    assert first == [2] * 5 + [3] * 5
    assert [counts[1, row] for row in range(4)] == [1] * 4
    assert sorted(counts[2, row] for row in range(6)) == [0] * 3 + [1] * 3
    assert tuples(pairs) == tuples(mix([10, 4, 6], "concat", weights=[2.5, None, 0.5], seed=3))
    assert tuples(pairs) != tuples(mix([10, 4, 6], "concat", weights=[2.5, None, 0.5], seed=4))


def test_weights_when_interleaving_are_probabilities():
    weighted = mix([50, 60], "interleave_over", weights=[3.0, 1.0], seed=5)
    assert tuples(weighted) == tuples(mix([50, 60], "interleave_over", probabilities=[0.75, 0.25], seed=5))


def test_probabilities_that_add_up_to_one_as_written_are_made_to_exactly():
    rounded, exact = (mix([5, 5, 5], "interleave_over", probabilities=[p] * 3, seed=2) for p in (0.3333333, 1 / 3))
    assert tuples(rounded) == tuples(exact)


def test_what_cannot_be_mixed():
    with pytest.raises(ConfigError, match="2 numbers for 3 data sets"):
        mix([1, 2, 3], "interleave_under", probabilities=[0.5, 0.5], seed=0)
    with pytest.raises(ConfigError, match="twice"):
        mix([1, 2], "interleave_under", probabilities=[0.5, 0.5], weights=[1.0, 2.0], seed=0)
    with pytest.raises(ConfigError, match="probability 0"):
        mix([1, 2], "interleave_over", probabilities=[1.0, 0.0], seed=0)
    assert tuples(mix([2, 9], "interleave_under", probabilities=[1.0, 0.0], seed=0)) == [(0, 0), (0, 1)]


@pytest.mark.parametrize("val_size", [3, 0.25, 0.01])
def test_splitting(val_size):
    expected = datasets.Dataset.from_dict({"row": range(101)}).train_test_split(test_size=val_size, seed=9)
    train, held = split(mix([101], "concat", seed=0), float(val_size), 9)
    assert train[:, 1].tolist() == list(expected["train"]["row"])
    assert held[:, 1].tolist() == list(expected["test"]["row"])


def test_a_val_size_of_one_is_one_row():
    train, held = split(mix([10], "concat", seed=0), 1.0, 0)
    assert (len(train), len(held)) == (9, 1)


@pytest.mark.parametrize("val_size", [10, 11])
def test_holding_out_everything(val_size):
    with pytest.raises(DataError, match="leave nothing to train on"):
        split(mix([10], "concat", seed=0), val_size, 0)


def test_selecting():
    assert select(10, max_samples=3, num_samples=None, seed=0).tolist() == [0, 1, 2]
    assert select(2, max_samples=3, num_samples=None, seed=0).tolist() == [0, 1]
    drawn = select(100, max_samples=None, num_samples=30, seed=1)
    assert len(set(drawn.tolist())) == 30
    assert drawn.tolist() == select(100, max_samples=None, num_samples=30, seed=1).tolist()
    assert drawn.tolist() != select(100, max_samples=None, num_samples=30, seed=2).tolist()
    more = select(5, max_samples=None, num_samples=12, seed=1)
    assert len(more) == 12
    assert set(more[:5].tolist()) == set(range(5))
    assert np.all((more >= 0) & (more < 5))
