"""How the rows of a micro-batch are dealt out to ranks."""

from __future__ import annotations

import itertools
import random

import pytest

from luthier.train.sampler import Bundles, RankSampler, share


def _all_ranks(size, *, world, batch, sizes, epoch=0):
    samplers = [
        RankSampler(size, batch_size=batch, rank=rank, world=world, seed=3, shuffle=True, sizes=sizes)
        for rank in range(world)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in samplers]


@pytest.mark.parametrize("world, batch, size", [(2, 2, 23), (3, 1, 23), (4, 3, 50), (2, 4, 3)])
def test_every_micro_batch_has_the_rows_it_had(world, batch, size):
    rng = random.Random(size)
    sizes = [rng.randint(1, 900) for _ in range(size)]
    plain = _all_ranks(size, world=world, batch=batch, sizes=None)
    even = _all_ranks(size, world=world, batch=batch, sizes=sizes)
    assert len({len(steps) for steps in even}) == 1
    for before, after in zip(zip(*plain), zip(*even)):
        assert sorted(itertools.chain(*before)) == sorted(itertools.chain(*after))
        assert max(map(len, after)) <= batch
    assert even == _all_ranks(size, world=world, batch=batch, sizes=sizes), "nothing is left to chance"


def test_one_process_keeps_its_order():
    assert _all_ranks(9, world=1, batch=2, sizes=[9, 8, 7, 6, 5, 4, 3, 2, 1]) == _all_ranks(
        9, world=1, batch=2, sizes=None
    )


def test_tokens_are_nearly_as_even_as_they_can_be():
    rng = random.Random(5)
    found = best = plain = 0
    for _ in range(200):
        sizes = [int(rng.lognormvariate(5, 1)) + 1 for _ in range(6)]
        total, rows = sum(sizes), list(range(6))
        shares = share(rows, sizes, world=2, most=3)
        found += max(sum(sizes[i] for i in part) for part in shares)
        plain += max(sum(sizes[:3]), sum(sizes[3:]))
        # Brute force: every way to give three of six rows to the first rank.
        best += min(
            max(sum(sizes[i] for i in half), total - sum(sizes[i] for i in half))
            for half in itertools.combinations(rows, 3)
        )
    assert best <= found < 1.01 * best
    assert plain > 1.15 * best, "the sizes are uneven enough to tell"


def test_a_row_keeps_its_place_in_a_share():
    assert share([7, 3, 9, 1], {7: 10, 3: 1, 9: 2, 1: 9}, world=2, most=2) == [[7, 3], [9, 1]]


def test_sizes_of_packed_rows_are_sums():
    examples = [(None, "")] * 4
    assert Bundles(examples, [[0, 3], [1], [2]], tokens=[5, 6, 7, 8]).sizes() == [13, 6, 7]
    assert Bundles(examples, tokens=[5, 6, 7, 8]).sizes() == [5, 6, 7, 8]
    assert Bundles(examples).sizes() is None
