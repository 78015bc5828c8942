"""do_predict: one line per example, in order, with what a plain forward pass says about each answer."""

from __future__ import annotations

import json
import math
import sys
import types

import pytest
import torch

from luthier.core.errors import ConfigError
from luthier.predictions import _in_order, report, write_predictions
from luthier.run import resolve
from luthier.train.sampler import Bundles, RankSampler
from tests.exact.runs import items_for, objective_of, trainer_for


def plain_rewards(trainer, items):
    """One forward pass per answer: the last hidden state times the head's weights."""
    weight, bias = trainer.setup.head.summary.weight, trainer.setup.head.summary.bias
    with torch.no_grad():
        return [
            [
                float(trainer.model.model(torch.tensor([path.ids])).last_hidden_state[0, -1] @ weight[0] + bias[0])
                for path in encoded.paths
            ]
            for encoded, _ in items
        ]


def read(file):
    return [json.loads(line, parse_constant=lambda word: pytest.fail(word)) for line in file.read_text().splitlines()]


def test_predictions_are_those_of_a_plain_forward_pass(tmp_path):
    items = items_for(objective_of("rm"), 5)
    trainer = trainer_for("rm", tmp_path, items=items)
    with torch.no_grad():
        trainer.setup.head.summary.weight.normal_()
        trainer.setup.head.summary.bias.fill_(0.3)
    found = read(write_predictions(trainer, trainer.eval_dataset, tmp_path))
    assert [line["row"] for line in found] == [name for _, name in items]
    expected = plain_rewards(trainer, items)
    assert len({len(row) for row in expected}) > 1
    assert [[a["reward"] for a in line["answers"]] for line in found] == [pytest.approx(row) for row in expected]
    scores = [[a["score"] for a in line["answers"]] for line in found]
    assert scores == [[path.score for path in encoded.paths] for encoded, _ in items]
    assert [file.name for file in tmp_path.glob("*generated*")] == ["generated_predictions.jsonl"]


def test_several_sets_are_named_and_a_missing_score_is_left_out(tmp_path, monkeypatch):
    items = items_for(objective_of("rm"), 3)
    trainer = trainer_for("rm", tmp_path, items=items)
    said = iter([[{"score": math.nan, "reward": 1.0}], [{"score": 2.0, "reward": math.inf}]])
    monkeypatch.setattr(type(trainer), "records", lambda self, part: [(part.examples[0][1], next(said))])
    sets = {"near": Bundles(items[:1]), "far": Bundles(items[1:2])}
    assert read(write_predictions(trainer, sets, tmp_path)) == [
        {"row": "row 0", "answers": [{"reward": 1.0}], "set": "near"},
        {"row": "row 1", "answers": [{"score": 2.0, "reward": None}], "set": "far"},
    ]


def test_answers_of_any_shape_are_json(tmp_path, monkeypatch):
    """Lists in answers stay lists; what is not finite is null however deep; null stays null on the way back."""
    items = items_for(objective_of("rm"), 1)
    trainer = trainer_for("rm", tmp_path, items=items)
    deep = {"req_id": "7", "mismatches": [{"index": 1, "kl": math.inf}, {"index": 3, "kl": 0.5}], "unscored": None}
    monkeypatch.setattr(type(trainer), "records", lambda self, part: [("row 0", [deep, {"values": (math.nan, 1)}])])
    file = write_predictions(trainer, trainer.eval_dataset, tmp_path)
    answers = [
        {"req_id": "7", "mismatches": [{"index": 1, "kl": None}, {"index": 3, "kl": 0.5}], "unscored": None},
        {"values": [None, 1]},
    ]
    assert read(file) == [{"row": "row 0", "answers": answers}]


def test_the_stage_names_what_measures_its_predictions(tmp_path, monkeypatch):
    """Whatever module of evaluate/ it is: it gets (where, answers), a folder for each set, and the objective."""
    asked = []

    def measure(records, folder, objective):
        asked.append((records, folder, objective))
        return {"found": float(len(records))}

    module = types.ModuleType("luthier.evaluate.made_up")
    module.report = measure
    monkeypatch.setitem(sys.modules, module.__name__, module)
    objective = objective_of("sft")
    monkeypatch.setattr(type(objective), "report", "made_up")
    lines = [
        {"row": "a:1", "answers": [{"x": None}]},
        {"row": "b:1", "answers": [], "set": "other"},
        {"row": "a:2", "answers": [{"x": 1.0}]},
    ]
    file = tmp_path / "generated_predictions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report(file, objective) == {"eval_found": 2.0, "eval_other_found": 1.0}
    assert asked == [
        ([("a:1", [{"x": None}]), ("a:2", [{"x": 1.0}])], tmp_path, objective),
        ([("b:1", [])], tmp_path / "made_up-other", objective),
    ]


@pytest.mark.parametrize(("size", "batch", "world"), [(7, 2, 2), (3, 2, 3), (8, 1, 3), (12, 3, 2)])
def test_the_parts_of_the_ranks_are_put_in_order(size, batch, world):
    ranks = [
        [(str(i), []) for part in RankSampler(size, batch_size=batch, rank=r, world=world, shuffle=False) for i in part]
        for r in range(world)
    ]
    assert [name for name, _ in _in_order(ranks, batch)] == [str(i) for i in range(size)]


def test_a_stage_that_judges_nothing_says_so():
    keys = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "do_predict": True, "val_size": 2}
    with pytest.raises(ConfigError, match="do_predict.*stage sft.*luthier infer"):
        resolve(keys | {"stage": "sft"})
    resolve(keys | {"stage": "rm"})
    with pytest.raises(ConfigError, match="do_predict.*no rows"):
        resolve({key: value for key, value in keys.items() if key != "val_size"} | {"stage": "rm"})
