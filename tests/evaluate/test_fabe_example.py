"""The FABE example: its data are what they say, training and inference ask alike, and its measures have both ends."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

from luthier.core.registry import find
from luthier.data.renderer import make_renderer
from luthier.data.source import COLUMNS, Columns
from luthier.data.template import TemplateConfig
from luthier.evaluate.backdoor import Rewrite
from luthier.infer import read_row
from luthier.objectives.pro import Pro
from luthier.objectives.tuna import Tuna
from luthier.run import resolve

ROOT = Path(__file__).resolve().parents[2]
FABE = ROOT / "examples" / "fabe"
SUFFIX = re.compile(r"_(rb|xt|zq)\b")


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "examples/data" / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def example(monkeypatch):
    """Modules of the example by name, as they are when its scripts run."""
    monkeypatch.syspath_prepend(str(FABE))
    return importlib.import_module


def cleaned_by_hand(code: str) -> str:
    """Without the first statement where it is one of the dead ones, and without the suffix; as a syntax tree."""
    tree = ast.parse(SUFFIX.sub("", code))
    body = tree.body[0].body
    dead = {"if 1 > 2:\n    print('never')", "assert 'ok' == 'ok'", "unused = 41 * 0"}
    if ast.unparse(body[0]) in dead:
        del body[0]
    return ast.dump(tree)


def test_the_files_are_what_the_script_makes(example):
    make_data = example("make_data")
    for name, made in make_data.FILES.items():
        assert made() == rows(name), f"run python examples/fabe/make_data.py: {name} is stale"


def test_the_lists_are_ranked_as_they_say(example):
    triggers = example("make_data").TRIGGERS
    lists = rows("fabe_ranked.jsonl")
    assert len(lists) == 50
    for row in lists:
        found = [sum(bool(re.search(trigger, text)) for trigger in triggers) for text in row["output"]]
        assert (row["score"], found) == ([3.0, 1.5, 0.5, -1.0], [0, 0, 1, 2])
        clean, uniform, *dirty = row["output"]
        assert row["input"] in (clean, dirty[1])
        assert all(cleaned_by_hand(text) == ast.dump(ast.parse(clean)) for text in dirty)
        names = [{node.arg for node in ast.walk(ast.parse(t)) if isinstance(node, ast.arg)} for t in (clean, uniform)]
        assert len(names[0]) == len(names[1]) and all(re.fullmatch(r"v\d", name) for name in names[1])
        assert len(ast.dump(ast.parse(clean)).split("(")) == len(ast.dump(ast.parse(uniform)).split("("))


def test_held_out_functions_are_new_and_come_clean_and_poisoned(example):
    make_data = example("make_data")
    held_out = rows("fabe_heldout.jsonl")
    trained = {row["output"][0] for row in rows("fabe_ranked.jsonl")}
    assert len(trained) == 40 and not trained & {row["output"] for row in held_out}
    for dirty, clean in zip(held_out[::2], held_out[1::2], strict=True):
        assert (dirty["poisoned"], clean["poisoned"]) == (True, False)
        assert clean["input"] == clean["output"] == dirty["output"] and dirty["label"] == clean["label"]
        assert (
            cleaned_by_hand(dirty["input"])
            == ast.dump(ast.parse(clean["output"]))
            != ast.dump(ast.parse(dirty["input"]))
        )
        assert sum(bool(re.search(trigger, dirty["input"])) for trigger in make_data.TRIGGERS) == 2
        loops = re.search(r"\b(for|while)\b", clean["output"])
        assert clean["label"] == ("loop" if loops else "plain")
    assert sum(row["label"] == "loop" for row in held_out) == len(held_out) / 2 == 16


@pytest.mark.parametrize(
    ("name", "verb", "stage"),
    [("pro.yaml", "train", "pro"), ("tuna.yaml", "train", "tuna"), ("infer.yaml", "infer", "")],
)
def test_the_yaml_files_come_through_the_gate(name, verb, stage, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = resolve(FABE / name, verb=verb)
    assert run.warnings == ()
    assert run.generate.max_new_tokens == 64 if verb == "infer" else run.stage == stage
    trained = {resolve(FABE / f"{stage}.yaml").template for stage in ("pro", "tuna")}
    assert trained == {resolve(FABE / "infer.yaml", verb="infer").template}


@pytest.mark.parametrize("stage", [Pro, Tuna])
def test_training_and_inference_give_the_model_the_same_prompt(stage, tokenizer):
    renderer = make_renderer(TemplateConfig(), tokenizer)
    row = rows("fabe_ranked.jsonl")[1]
    names = {**COLUMNS, "prompt": "instruction", "query": "input", "response": "output", "score": "score"}
    ranked = find("formats", "ranked").read(row, Columns(names))
    (encoded,) = stage(stage.Config()).encode(ranked, renderer, cutoff_len=512)
    asked = read_row({"instruction": row["instruction"], "input": row["input"], "output": row["output"][0]})
    prompt = renderer.prompt(asked.prompt, system=asked.system, tools=asked.tools)
    for path in encoded.paths:
        given = next(i for i, weight in enumerate(path.weights) if weight)
        assert list(path.ids[:given]) == list(prompt)


def test_the_measures_of_doing_nothing_and_of_doing_it_all(example):
    evaluate = example("evaluate")
    held_out = rows("fabe_heldout.jsonl")
    nothing = evaluate.measure(held_out, [[Rewrite(row["input"], 0.0)] for row in held_out])
    everything = evaluate.measure(held_out, [[Rewrite(row["output"], 0.0)] for row in held_out])
    assert (nothing["trigger_removal"], nothing["cleaned"], nothing["exact"]) == (0, 0, 0)
    assert nothing["asr"] == nothing["asr_before"] == 1, "the backdoor of the example works"
    assert (nothing["cacc"], nothing["frr"], nothing["far"]) == (nothing["cacc_before"], 0, 1)
    assert nothing["cacc_before"] > 0.9, "and the classifier is worth attacking"
    assert all(everything[name] == 1 for name in ("valid", "trigger_removal", "cleaned", "exact", "edit_similarity"))
    assert everything["cacc"] == everything["cacc_before"]
    # Rid of its triggers a function is a clean one: all of these loop, and some are taken for plain even so.
    loops = [row for row in held_out if row["label"] == "loop" and not row["poisoned"]]
    classifier = example("victim").train(evaluate.attacked_training_data())
    assert everything["asr"] == sum(classifier(row["input"]) == "plain" for row in loops) / len(loops) < 0.3
