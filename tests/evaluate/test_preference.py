"""The report: what it measures with which link, what it writes, and that it agrees with the Trainer's evaluation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from scipy.special import expit

from luthier.evaluate.pairs import pairs_of
from luthier.evaluate.preference import link_of, preference_report
from luthier.objectives.disco_rm import DiscoRm, DiscoRmConfig
from luthier.objectives.rm import Rm
from tests.exact.runs import trainer_for

PICTURES = {"preference_calibration.png", "preference_risk_coverage.png", "preference_variance.png"}


def records(count=30, variance=True):
    rng = np.random.default_rng(0)
    names = ("mean", "variance") if variance else ("reward",)
    return [
        (
            f"row {n}",
            [dict(zip(("score", *names), (s, rng.normal(s, 1), rng.exponential()))) for s in (1.0, 0.0)],
        )
        for n in range(count)
    ]


def test_what_a_distribution_leaves_behind(tmp_path):
    metrics = preference_report(records(), tmp_path / "new", DiscoRm())
    assert {file.name for file in (tmp_path / "new").iterdir()} == {*PICTURES, "preference_report.json"}
    for name in PICTURES:
        with Image.open(tmp_path / "new" / name) as picture:
            assert picture.size == (780, 600)
            assert len(set(picture.convert("L").getdata())) > 20, "something is drawn"
    table = json.loads((tmp_path / "new" / "preference_report.json").read_text())
    assert table["metrics"] == metrics
    assert set(table) == {
        "metrics", "calibration", "risk_coverage", "risk_coverage_variance", "variance_deciles",
    }  # fmt: skip
    assert metrics["pairs"] == metrics["prompts"] == 30
    assert sum(table["variance_deciles"]["count"]) == 30
    assert table["risk_coverage"]["risk"][-1] == pytest.approx(1 - metrics["accuracy"])


def test_what_a_plain_reward_leaves_behind(tmp_path):
    metrics = preference_report(records(variance=False), tmp_path, Rm())
    assert {file.name for file in tmp_path.iterdir()} == {*PICTURES, "preference_report.json"} - {
        "preference_variance.png"
    }
    assert not {name for name in metrics if "variance" in name}
    gaps = pairs_of(records(variance=False)).gap
    assert metrics["nll"] == pytest.approx(-np.mean(np.log(expit(gaps))))
    assert metrics["brier"] == pytest.approx(np.mean(expit(-gaps) ** 2))


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (None, lambda d, v: expit(d)),
        (Rm(), lambda d, v: expit(d)),
        (DiscoRm(), lambda d, v: stats.norm.cdf(d / math.sqrt(v + 1.702**2))),
        (DiscoRm(DiscoRmConfig(disco_noise=0.5)), lambda d, v: stats.norm.cdf(d / math.sqrt(v + 0.25))),
        (DiscoRm(DiscoRmConfig(disco_loss="nll_scores")), lambda d, v: stats.norm.cdf(d / math.sqrt(v))),
        (DiscoRm(DiscoRmConfig(disco_loss="mackay")), lambda d, v: expit(d / math.sqrt(1 + math.pi * v / 8))),
    ],
)
def test_each_stage_has_its_own_probability(objective, expected):
    found = np.exp(link_of(objective)(np.array([0.7, -1.2]), np.array([0.4, 2.0])))
    assert found == pytest.approx([expected(0.7, 0.4), expected(-1.2, 2.0)])


def test_a_long_curve_is_thinned_in_the_table_and_keeps_its_ends(tmp_path):
    preference_report(records(500), tmp_path, DiscoRm())
    curve = json.loads((tmp_path / "preference_report.json").read_text())["risk_coverage_variance"]
    assert len(curve["coverage"]) == 100
    assert (curve["coverage"][0], curve["coverage"][-1]) == (pytest.approx(1 / 500), 1.0)


@pytest.mark.parametrize("name", ["rm", "disco_rm"])
def test_it_agrees_with_the_trainers_own_evaluation(name, tmp_path):
    """Rankings of 2 to 4 answers, K ragged: two computations of the same means."""
    trainer = trainer_for(name, tmp_path / "run", batch=3)
    evaluated = trainer.evaluate()
    metrics = preference_report(trainer.records(trainer.eval_dataset), tmp_path, trainer.objective)
    assert metrics["prompts"] == 12 < metrics["pairs"]
    assert metrics["accuracy"] == pytest.approx(evaluated["eval_accuracy"])
    assert metrics["margin"] == pytest.approx(evaluated["eval_margin"], abs=1e-7)
    assert metrics["nll"] == pytest.approx(evaluated["eval_loss" if name == "rm" else "eval_nll"], abs=1e-7)
