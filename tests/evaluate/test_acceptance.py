"""The report of an acceptance head: what it says, writes and draws, and what it says where something is missing."""

from __future__ import annotations

import copy
import json
import logging

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from luthier import predictions
from luthier.core.errors import ConfigError, DataError
from luthier.evaluate.acceptance import report
from luthier.evaluate.judgement import measures
from luthier.objectives.accept_head import AcceptHead, AcceptHeadConfig
from tests.evaluate.round_records import all_mismatches, all_rounds, random_records, random_round
from tests.evaluate.test_simulation import by_hand

PICTURES = {"accept_roc.png", "accept_calibration.png", "accept_simulation.png"}


def strict(file):
    """JSON as others read it: without NaN and Infinity."""
    return json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def column(records, name):
    return np.array([mismatch[name] for mismatch in all_mismatches(records)], float)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(records, folder, metrics) of one report."""
    folder = tmp_path_factory.mktemp("report") / "new"
    records = random_records(3, requests=9, most=20)
    return records, folder, report(iter(records), folder, AcceptHead())


def test_what_is_left_behind(written):
    records, folder, metrics = written
    assert {file.name for file in folder.iterdir()} == {*PICTURES, "accept_report.json"}
    for name in PICTURES:
        with Image.open(folder / name) as picture:
            assert picture.size == (780, 600)
            assert len(set(picture.convert("RGB").getdata())) > 50, "something is drawn"
    table = strict(folder / "accept_report.json")
    assert table["metrics"] == metrics
    assert set(table) == {"metrics", "macro", "notes", "calibration", "curves", "top_k", "roc"}
    assert set(table["curves"]) == {"head", "kl", "prob", "rank", "oracle"}
    assert sum(table["calibration"]["weight"]) == pytest.approx(1)
    assert metrics["positions"] == len(all_mismatches(records))
    assert (metrics["rounds"], metrics["requests"]) == (len(all_rounds(records)), 9)


def test_pooled_and_by_request(written):
    records, folder, metrics = written
    target, probability = column(records, "target"), column(records, "probability")
    pooled = measures(target, probability)
    assert {name: metrics[name] for name in pooled} == pytest.approx(pooled)
    each = {}
    for request in {r["req_id"] for r in all_rounds(records)}:
        mine = [m for r in all_rounds(records) if r["req_id"] == request for m in r["mismatches"]]
        values = [np.array([m[name] for m in mine]) for name in ("target", "probability")]
        for name, value in measures(*values).items() if mine else ():
            each.setdefault(name, []).append(value)
    macro = strict(folder / "accept_report.json")["macro"]
    assert {name: found["mean"] for name, found in macro.items()} == pytest.approx(
        {name: np.mean(values) for name, values in each.items()}
    )
    assert {name: found["requests"] for name, found in macro.items()} == {name: len(v) for name, v in each.items()}
    assert macro["roc_auc"]["requests"] < macro["mae"]["requests"], "some requests have one kind only"
    assert metrics["macro_roc_auc"] == pytest.approx(np.mean(each["roc_auc"]))


def test_baselines_have_their_own_auc_and_their_own_direction(written):
    records, _, metrics = written
    good = column(records, "target") >= 0.5
    for name, sign in (("kl", -1), ("prob", 1), ("rank", -1)):
        score = sign * column(records, name)
        u = stats.mannwhitneyu(score[good], score[~good]).statistic
        assert metrics[f"{name}_roc_auc"] == pytest.approx(u / (good.sum() * (~good).sum()))
        gap = metrics["roc_auc"] - metrics[f"{name}_roc_auc"]
        assert metrics[f"roc_auc_over_{name}_low"] < gap < metrics[f"roc_auc_over_{name}_high"]
    assert metrics["roc_auc_low"] < metrics["roc_auc"] < metrics["roc_auc_high"]


def test_the_simulation_is_told_at_each_harm(written):
    records, _, metrics = written
    rules = {
        "": lambda m: m["probability"],
        "kl_": lambda m: -m["kl"],
        "prob_": lambda m: m["prob"],
        "rank_": lambda m: -m["rank"],
        "oracle_": lambda m: m["target"],
    }
    exact = by_hand(records, lambda m: 0, 1)[0]
    assert metrics["accepted_exact"] == pytest.approx(exact)
    assert metrics["accepted_everything"] == pytest.approx(by_hand(records, lambda m: 0, 0)[0])
    for prefix, rule in rules.items():
        points = [by_hand(records, rule, t) for t in {rule(m) for m in all_mismatches(records)}]
        for share in (1, 5, 10):
            best = max([exact, *(kept for kept, harm, *_ in points if harm <= share / 100)])
            assert metrics[f"{prefix}accepted_at_harm_{share}"] == pytest.approx(best)
    kept, harm, *_ = by_hand(records, rules[""], 0.5)
    assert (metrics["accepted_at_half"], metrics["harm_at_half"]) == pytest.approx((kept, harm))


def test_curves_speak_in_the_rules_own_numbers(written):
    records, folder, _ = written
    table = strict(folder / "accept_report.json")
    for name, sign in (("head", 1), ("kl", -1), ("rank", -1), ("oracle", 1)):
        field = {"head": "probability", "oracle": "target"}.get(name, name)
        curve = table["curves"][name]
        assert curve["threshold"][0] is None and curve["harmful_share"][0] is None
        for point in range(1, len(curve["threshold"])):
            found = by_hand(
                records, lambda m, sign=sign, field=field: sign * m[field], sign * curve["threshold"][point]
            )
            expected = [curve[part][point] for part in ("accepted", "harm")]
            assert expected == pytest.approx(found[:2])
            assert curve["tokens_per_pass"][point] == pytest.approx(found[0] + 1)
            assert curve["harmful_share"][point] == pytest.approx(found[3] / found[2])
    assert [row["k"] for row in table["top_k"]] == [1, 2, 3, 5, 10, 20, 50], "up to the first k that takes all"
    for row in table["top_k"]:
        found = by_hand(records, lambda m: -m["rank"], -row["k"])
        assert (row["accepted"], row["harm"]) == pytest.approx(found[:2])


def test_the_suggested_threshold_keeps_most_within_accept_harm(written, tmp_path):
    records, _, metrics = written
    points = {t: by_hand(records, lambda m: m["probability"], t) for t in set(column(records, "probability").tolist())}
    for allowed, found in (
        (0.05, metrics),
        (0.3, report(records, tmp_path, AcceptHead(AcceptHeadConfig(accept_harm=0.3)))),
    ):
        inside = {t: point for t, point in points.items() if point[1] <= allowed}
        if not inside:
            assert "threshold" not in found
            continue
        kept, harm = max(point[:2] for point in inside.values())
        assert (found["threshold_accepted"], found["threshold_harm"]) == pytest.approx((kept, harm))
        assert points[found["threshold"]][:2] == pytest.approx((kept, harm))
    assert "threshold" in found
    with pytest.raises(ConfigError, match="accept_harm: 1.5"):
        AcceptHeadConfig(accept_harm=1.5)


def test_what_is_missing_is_left_out_and_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="luthier")
    records = random_records(5, rivals=("prob",))
    metrics = report(records, tmp_path, AcceptHead())
    table = strict(tmp_path / "accept_report.json")
    assert set(table["curves"]) == {"head", "prob", "oracle"} and "top_k" not in table
    assert not {name for name in metrics if name.startswith(("kl_", "rank_"))}
    total = len(all_mismatches(records))
    said = [note for note in table["notes"] if note.startswith("kl is missing")]
    assert said[0].startswith(f"kl is missing at {total} of {total} mismatches") and "luthier collect" in said[0]
    assert all(note in caplog.text for note in table["notes"])
    # A field that only some mismatches have compares other positions than the head's: also left out.
    some = copy.deepcopy(random_records(5))
    all_mismatches(some)[0]["kl"] = None
    assert "kl_roc_auc" not in report(some, tmp_path, AcceptHead())


@pytest.mark.parametrize(("target", "kind"), [(1.0, "acceptable"), (0.0, "to be rejected")])
def test_mismatches_of_one_kind(tmp_path, target, kind):
    records = random_records(2)
    for mismatch in all_mismatches(records):
        mismatch["target"] = target
    metrics = report(records, tmp_path, AcceptHead(AcceptHeadConfig(accept_harm=0.0)))
    table = strict(tmp_path / "accept_report.json")
    assert any(kind in note for note in table["notes"])
    assert "roc" not in table and not {name for name in metrics if "roc_auc" in name}
    assert not (tmp_path / "accept_roc.png").exists()
    if target:
        assert metrics["threshold_accepted"] == metrics["accepted_everything"] > metrics["accepted_exact"]
    else:
        assert "threshold" not in metrics and metrics["accepted_at_harm_10"] >= metrics["accepted_exact"]
        assert any("No threshold harms at most 0.0%" in note for note in table["notes"])


def test_few_requests_and_open_rounds_are_said(tmp_path):
    records = random_records(7, requests=2)
    metrics = report(records, tmp_path, AcceptHead())
    notes = " ".join(strict(tmp_path / "accept_report.json")["notes"])
    assert "roc_auc" in metrics and "roc_auc_low" not in metrics and "requests are too few for intervals" in notes
    share = np.mean([answer["unscored"] is not None for answer in all_rounds(records)])
    assert share and f"{share:.1%} of the rounds end at a mismatch that nobody scored" in notes


def test_without_matplotlib_the_numbers_are_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    report(random_records(0), tmp_path, AcceptHead())
    assert [file.name for file in tmp_path.iterdir()] == ["accept_report.json"]
    assert "pip install luthier[plots]" in caplog.text


def test_nothing_judged_is_an_error(tmp_path):
    row = {"req_id": "a", "row": 1, "draft": 3, "mismatches": [], "unscored": None}
    with pytest.raises(DataError, match="None of the 1 rounds has a scored mismatch"):
        report([("f:1", [row])], tmp_path, AcceptHead())


@pytest.mark.parametrize(("field", "value"), [("probability", None), ("probability", 1.5), ("target", float("nan"))])
def test_a_judgement_that_is_none_names_its_round(tmp_path, field, value):
    mismatch = {"index": 2, "target": 0.5, "probability": 0.5} | {field: value}
    row = {"req_id": "q7", "row": 12, "draft": 3, "mismatches": [mismatch], "unscored": None}
    with pytest.raises(DataError, match=f"f:1: request q7, round at line 12, mismatch 2: {field} is"):
        report([("f:1", [row])], tmp_path, AcceptHead())


def test_from_the_predictions_file_of_several_sets(tmp_path):
    """What is written to disk measures what is in memory; each set has its folder and its names."""
    sets = {"near": random_records(1), "far": random_records(2)}
    lines = [json.dumps({"row": row, "answers": answers, "set": name}) for name in sets for row, answers in sets[name]]
    (tmp_path / predictions.FILE).write_text("".join(f"{line}\n" for line in lines))
    found = predictions.report(tmp_path / predictions.FILE, AcceptHead())
    for name, records in sets.items():
        direct = report(records, tmp_path / "direct", AcceptHead())
        assert {k: v for k, v in found.items() if k.startswith(f"eval_{name}_")} == {
            f"eval_{name}_{k}": v for k, v in direct.items()
        }
        assert (tmp_path / f"acceptance-{name}" / "accept_report.json").is_file()


def test_a_long_curve_is_thinned_in_the_table_and_not_in_the_measures(tmp_path):
    import random

    rng = random.Random(0)
    rounds = [random_round(rng, str(n % 7), n) for n in range(900)]
    for round_ in rounds:
        for mismatch in round_["mismatches"]:
            mismatch["probability"] = rng.random()
    metrics = report([("f:1", rounds)], tmp_path, AcceptHead())
    curve = strict(tmp_path / "accept_report.json")["curves"]["head"]
    assert len(curve["accepted"]) == 200 and curve["accepted"][-1] == metrics["accepted_everything"]
    kept, harm, *_ = by_hand([("f:1", rounds)], lambda m: m["probability"], metrics["threshold"])
    assert (metrics["threshold_accepted"], metrics["threshold_harm"]) == pytest.approx((kept, harm))
