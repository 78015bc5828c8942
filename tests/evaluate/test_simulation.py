"""The simulation against three plain loops: over thresholds, rounds and positions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.evaluate.rounds import rounds_of
from luthier.evaluate.simulation import simulate
from tests.evaluate.round_records import all_rounds, random_records

RULES = {
    "probability": lambda m: m["probability"],
    "target": lambda m: m["target"],
    "kl": lambda m: -m["kl"],
    "rank": lambda m: -m["rank"],
}


def score_of(rounds, name):
    return {"probability": rounds.probability, "target": rounds.target}.get(name, rounds.rivals.get(name))


def by_hand(records, rule, threshold):
    """(mean kept, share of rounds harmed, accepted mismatches, harmful ones), position by position."""
    kept = harmed = accepted = harmful = 0
    rounds = all_rounds(records)
    for round_ in rounds:
        judged = {m["index"]: m for m in round_["mismatches"]}
        bad = 0
        for position in range(round_["draft"]):
            if round_["unscored"] is not None and position >= round_["unscored"]:
                break
            if position in judged:
                if not rule(judged[position]) >= threshold:
                    break
                accepted += 1
                bad += judged[position]["target"] < 0.5
            kept += 1
        harmful += bad
        harmed += bad > 0
    return kept / len(rounds), harmed / len(rounds), accepted, harmful


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", range(8))
def test_every_point_of_a_curve_is_what_loops_find(name, seed):
    records = random_records(seed)
    rule = RULES[name]
    rounds = rounds_of(records)
    curve = simulate(rounds, score_of(rounds, name))
    assert curve.threshold[0] == math.inf and len(set(curve.threshold)) == len(curve.threshold) > 1
    for point, threshold in enumerate(curve.threshold):
        found = [part[point] for part in (curve.accepted, curve.harm, curve.mismatches, curve.harmful)]
        assert found == pytest.approx(by_hand(records, rule, threshold))
    # Between and beyond its points too: nothing changes there.
    values = sorted({rule(m) for r in all_rounds(records) for m in r["mismatches"]})
    for threshold in [values[0] - 1, *values, *(np.add(values[1:], values[:-1]) / 2), values[-1] + 1]:
        point = curve.at(threshold)
        assert (curve.accepted[point], curve.harm[point]) == pytest.approx(by_hand(records, rule, threshold)[:2])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_what_must_hold_of_every_curve(seed, harm):
    records = random_records(seed, requests=3)
    if not any(r["mismatches"] for r in all_rounds(records)):
        return
    rounds = rounds_of(records)
    curves = [simulate(rounds, score_of(rounds, name)) for name in RULES]
    for curve in curves:
        assert (np.diff(curve.threshold) < 0).all(), "lower and lower thresholds"
        for part in (curve.accepted, curve.harm, curve.mismatches, curve.harmful):
            assert (np.diff(part) >= 0).all(), "accept more, keep and harm no less"
        assert curve.harm[0] == curve.mismatches[0] == 0, "matches harm nothing"
        assert (curve.harmful <= curve.mismatches).all() and (curve.accepted <= rounds.length.mean() + 1e-12).all()
        best = curve.within(harm)
        assert curve.harm[best] <= harm + 1e-9
        assert best + 1 == len(curve.harm) or curve.harm[best + 1] > harm
        thin = curve.thinned(3)
        assert len(thin.harm) <= 3 and (thin.harm[0], thin.harm[-1]) == (curve.harm[0], curve.harm[-1])
    # Accepting nothing and accepting everything are the same whatever the rule.
    assert len({(c.accepted[0], c.accepted[-1], c.harm[-1]) for c in curves}) == 1
    oracle = curves[list(RULES).index("target")]
    assert oracle.harm[oracle.at(0.5)] == 0, "who knows the scores harms nobody"


def test_a_round_that_can_be_read_off():
    """Draft of 6: match, good mismatch, match, bad mismatch, match, match; and one that matches throughout."""
    mismatches = [
        {"index": 1, "target": 0.9, "probability": 0.6},
        {"index": 3, "target": 0.2, "probability": 0.7},
    ]
    rows = [
        {"req_id": "a", "row": 1, "draft": 6, "mismatches": mismatches, "unscored": None},
        {"req_id": "a", "row": 2, "draft": 4, "mismatches": [], "unscored": None},
    ]
    rounds = rounds_of([("f:1", rows)])
    head = simulate(rounds, rounds.probability)
    # 0.7 at place 3 is reached only once 0.6 at place 1 passes: both come in at 0.6.
    assert head.threshold.tolist() == [math.inf, 0.6]
    assert head.accepted.tolist() == [(1 + 4) / 2, (6 + 4) / 2]
    assert head.harm.tolist() == [0, 0.5]
    oracle = simulate(rounds, rounds.target)
    assert oracle.threshold.tolist() == [math.inf, 0.9, 0.2]
    assert oracle.accepted.tolist() == [2.5, 3.5, 5.0]
    assert (oracle.mismatches.tolist(), oracle.harmful.tolist()) == ([0, 1, 2], [0, 0, 1])


def test_nothing_is_known_behind_a_mismatch_without_a_score():
    mismatches = [{"index": 4, "target": 1.0, "probability": 0.9}]
    row = {"req_id": "a", "row": 1, "draft": 6, "mismatches": mismatches, "unscored": 2}
    rounds = rounds_of([("f:1", [row])])
    curve = simulate(rounds, rounds.probability)
    assert (curve.threshold.tolist(), curve.accepted.tolist()) == ([math.inf], [2.0])
    assert len(rounds.target) == 1, "its judgement is measured all the same"
