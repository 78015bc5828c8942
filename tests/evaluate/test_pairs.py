"""Pairs from records and the measures of them, against loops and numbers worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from luthier.core.errors import DataError
from luthier.evaluate.pairs import accuracy, pairs_of, read_records, scores, sigmoid_link


def record(origin, *answers):
    names = ("score", "mean", "variance") if len(answers[0]) == 3 else ("score", "reward")
    return origin, [dict(zip(names, answer)) for answer in answers]


def random_records(count=20, seed=0):
    rng = np.random.default_rng(seed)
    return [
        record(f"row {n}", *((float(rng.integers(4)), rng.normal(), rng.exponential()) for _ in range(k)))
        for n, k in enumerate(rng.integers(2, 5, count))
    ]


def test_two_pairs_by_hand():
    """Gaps 2 and -1: -ln sigma is 0.126928 and 1.313262, (1 - P)^2 is 0.014209 and 0.534447."""
    pairs = pairs_of([record("a", (1.0, 3.0), (0.0, 1.0)), record("b", (0.0, 1.0), (1.0, 0.0))])
    assert scores(pairs, sigmoid_link) == pytest.approx(
        {"accuracy": 0.5, "margin": 0.5, "nll": 0.720095, "brier": 0.274328}, abs=1e-6
    )
    assert (pairs.prompts, len(pairs), pairs.distributed) == (2, 2, False)


def test_every_prompt_weighs_the_same():
    """One prompt of a right pair, one of a ranking with three pairs of which one is right: (1 + 1/3) / 2."""
    pairs = pairs_of([record("a", (1.0, 1.0), (0.0, 0.0)), record("b", (2.0, 1.0), (1.0, 2.0), (0.0, 1.5))])
    assert len(pairs) == 4
    assert accuracy(pairs) == pytest.approx(2 / 3)


def test_measures_are_the_loop():
    records = random_records()
    total = {name: [] for name in ("accuracy", "margin", "nll", "brier", "variance_better", "variance_worse")}
    for _, answers in records:
        found = {name: [] for name in total}
        for a, b in itertools.permutations(answers, 2):
            if a["score"] > b["score"]:
                gap = a["mean"] - b["mean"]
                p = stats.norm.cdf(gap / math.sqrt(a["variance"] + b["variance"] + 1))
                values = (float(gap > 0), gap, -math.log(p), (1 - p) ** 2, a["variance"], b["variance"])
                for name, value in zip(found, values):
                    found[name].append(value)
        if found["nll"]:
            for name, values in found.items():
                total[name].append(np.mean(values))
    pairs = pairs_of(records)
    measured = scores(pairs, lambda gap, variance: stats.norm.logcdf(gap / np.sqrt(variance + 1)))
    assert measured == pytest.approx({name: np.mean(values) for name, values in total.items()})
    assert pairs.distributed and pairs.weight.sum() == pytest.approx(1)


@pytest.mark.parametrize("gap", [-800.0, -2.0, 0.0, 2.0, 800.0])
def test_the_sigmoid_does_not_overflow(gap):
    assert sigmoid_link(np.array([gap]), np.zeros(1))[0] == pytest.approx(
        math.log(expit(gap)) if gap > -700 else gap, abs=1e-12
    )


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zero_is_a_reward_and_a_score(zero):
    assert accuracy(pairs_of([record("a", (zero, -1.0), (1.0, zero))])) == 1.0


def test_a_tie_of_rewards_is_a_miss_and_ties_of_scores_are_no_pairs():
    assert accuracy(pairs_of([record("a", (1.0, 2.0), (0.0, 2.0))])) == 0.0
    assert len(pairs_of([record("a", (1.0, 2.0), (1.0, 3.0), (0.0, 1.0))])) == 2


def test_answers_without_a_score_are_in_no_pair():
    unscored = ("b", [{"reward": 9.0}, {"reward": 1.0, "score": float("nan")}, {"reward": 1.0, "score": 1.0}])
    pairs = pairs_of([record("a", (1.0, 1.0), (0.0, 0.0)), unscored])
    assert (len(pairs), pairs.prompts) == (1, 1)


def test_swapping_the_scores_flips_every_gap_exactly():
    records = [record(f"{n}", (1.0, *x), (0.0, *y)) for n, (x, y) in enumerate([((0.3, 1.0), (0.1, 2.0))] * 2)]
    flipped = [(o, [answer | {"score": 1 - answer["score"]} for answer in answers]) for o, answers in records]
    assert (pairs_of(records).gap == -pairs_of(flipped).gap).all()


def test_nothing_to_compare_is_an_error():
    with pytest.raises(DataError, match="None of the 1 examples has two answers with different scores"):
        pairs_of([record("a", (1.0, 2.0), (1.0, 3.0))])
    with pytest.raises(DataError, match="data.jsonl:3: an answer has neither reward nor mean .only score, logp"):
        pairs_of([("data.jsonl:3", [{"score": 1.0, "logp": -3.0}])])


def test_records_are_read_from_a_predictions_file(tmp_path):
    file = tmp_path / "generated_predictions.jsonl"
    file.write_text(
        '{"row": "d.jsonl:4", "answers": [{"score": 1.0, "reward": 0.5}, {"score": 0.0, "reward": null}]}\n'
        '{"row": "d.jsonl:2", "answers": [{"reward": 0.0}], "set": "other"}\n'
    )
    (first, answers), second = read_records(file)
    assert (first, answers[0], second) == ("d.jsonl:4", {"score": 1.0, "reward": 0.5}, ("d.jsonl:2", [{"reward": 0.0}]))
    assert answers[1]["score"] == 0.0 and math.isnan(answers[1]["reward"])
    assert np.isnan(pairs_of([(first, answers)]).gap).all(), "a reward that is no number is seen"
