"""Ranked lists: what a row must bring, the order it gets, and how a data set is known to be one."""

from __future__ import annotations

import json

import pytest

from luthier.core.errors import DataError
from luthier.core.registry import find
from luthier.core.types import Answer, Message
from luthier.data.encode import prepare
from luthier.data.info import guess, sources
from luthier.data.renderer import make_renderer
from luthier.data.source import COLUMNS, BadRow, Columns, DataConfig, MissingColumn
from luthier.data.template import TemplateConfig

ALL = Columns(COLUMNS | {name: name for name in ("history", "system", "tools")})


def row(output, score, **more):
    return {"instruction": "Tidy up", "input": "x=1", "output": output, "score": score, **more}


def read(given, columns=ALL):
    return find("formats", "ranked").read(given, columns)


def candidate(rank, text, score):
    return Answer((Message("assistant", text),), score, f"candidate-{rank}")


def test_the_seeds_row_comes_out_sorted():
    example = read(row(["bad", "clean", "dirty", "fair"], [0.5, 3.0, -1.0, 1.5]))
    assert example.prompt == (Message("user", "Tidy up\nx=1"),)
    assert example.answers == (
        candidate(0, "clean", 3.0),
        candidate(1, "fair", 1.5),
        candidate(2, "bad", 0.5),
        candidate(3, "dirty", -1.0),
    )


def test_equal_scores_keep_their_order():
    names = [answer.messages[0].content for answer in read(row(["a", "b", "c", "d"], [1, 2, 1, 2])).answers]
    assert names == ["b", "d", "a", "c"]


def test_history_system_and_tools():
    example = read(row(["a", "b"], [1, 0], history=[["q", "r"]], system="Be brief", tools=[{"name": "f"}]))
    assert [(m.role, m.content) for m in example.prompt] == [
        ("user", "q"),
        ("assistant", "r"),
        ("user", "Tidy up\nx=1"),
    ]
    assert (example.system, json.loads(example.tools)) == ("Be brief", [{"name": "f"}])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (row(["a"], [1.0]), "fewer than two outputs | 1"),
        (row([], []), "fewer than two outputs | 0"),
        (row(["a", "b"], [1.0]), "not as many scores as outputs | 2 outputs, 1 scores"),
        (row(["a", "b"], [1.0, float("nan")]), "a score is not finite | score 2: nan"),
        (row(["a", "b"], [float("-inf"), 1]), "a score is not finite | score 1: -inf"),
        (row(["a", "b"], ["3.0", 1]), "a score is not a number | score 1: '3.0' (str)"),
        (row(["a", "b"], [1, None]), "a score is not a number | score 2: None"),
        (row(["a", "b"], [True, False]), "a score is not a number | score 1: True (bool)"),
        (row(["a", "b"], [2, 2.0]), "all scores are equal | 2: nothing to rank"),
        (row(["a", 3], [1, 0]), "an output is not text | output 2: 3 (int)"),
        (row(["a", ""], [1, 0]), "empty output | output 2"),
        (row(["a", "b", "a"], [1, 2, 3]), "the same output with different scores | output 3: 1 and 3"),
        (row("a", [1, 0]), "'output' is not a list | 'a' (str)"),
        (row(["a", "b"], "1, 0"), "'score' is not a list | '1, 0' (str)"),
        (row(["a", "b"], None), "'score' is not a list | None"),
        (row(["a", "b"], [1, 0], instruction="", input=""), "empty prompt"),
        (row(["a", "b"], [1, 0], system=3), "'system' is not text"),
        (row(["a", "b"], [1, 0], history="q"), "history is not a list"),
    ],
)
def test_rows_that_cannot_be_used(given, expected):
    with pytest.raises(BadRow) as caught:
        read(given)
    assert f"{caught.value.reason} | {caught.value.detail}".startswith(expected)


def test_the_same_output_twice_with_the_same_score_is_no_contradiction():
    assert len(read(row(["a", "b", "a"], [1, 2, 1])).answers) == 3


@pytest.mark.parametrize(
    ("missing", "meaning"), [("output", "response"), ("score", "score"), ("instruction", "prompt")]
)
def test_a_missing_column_is_named(missing, meaning):
    given = row(["a", "b"], [1, 0])
    del given[missing]
    with pytest.raises(MissingColumn) as caught:
        read(given)
    assert (caught.value.meaning, caught.value.column) == (meaning, missing)


def test_named_columns(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    columns = {"prompt": "question", "response": "candidates", "score": "marks"}
    info = {
        "named": {"file_name": str(tmp_path / "a.json"), "formatting": "ranked", "columns": columns},
        "usual": {"file_name": str(tmp_path / "a.json"), "formatting": "ranked", "ranking": True},
        "half": {"file_name": str(tmp_path / "a.json"), "formatting": "ranked", "columns": {"response": "output"}},
    }
    named, usual, half = sources("named,usual,half", info)
    (inline,) = sources([{"path": str(tmp_path / "a.json"), "format": "ranked", "columns": columns}], info)
    given = {"question": "q", "candidates": ["a", "b"], "marks": [0, 1]}
    for source in (named, inline):
        assert source.format == "ranked"
        assert [answer.score for answer in read(given, source.columns).answers] == [1.0, 0.0]
    assert [answer.score for answer in read(row(["a", "b"], [0, 1]), usual.columns).answers] == [1.0, 0.0]
    # As everywhere, naming columns says that the optional others do not exist; a ranking always has scores.
    assert (half.columns.name("score"), half.columns.name("prompt")) == ("score", None)


def test_it_is_known_by_its_first_row(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("")
    (source,) = sources(str(file), "data")
    assert guess(row(["a", "b"], [1, 0]), source, file).format == "ranked"
    assert guess(row(["a", "b"], None), source, file).format == "ranked"
    assert guess(row("a", 1.0), source, file).format == "alpaca"
    named = sources([{"path": str(file), "columns": {"prompt": "q", "response": "r", "score": "s"}}], "data")[0]
    assert guess({"q": "?", "r": ["a", "b"], "s": [1, 0]}, named, file).format == "ranked"


def prepared(file, stage, tokenizer, **keys):
    module = find("objectives", stage)
    objective = {"sft": "Sft", "rm": "Rm"}[stage]
    renderer = make_renderer(TemplateConfig(template="chatml"), tokenizer)
    config = DataConfig(dataset=str(file), data_cache_dir=str(file.parent / "cache"), **keys)
    return prepare(config, getattr(module, objective)(), renderer, cutoff_len=200, seed=0)


def test_from_a_file_to_ids_that_share_their_prompt(tmp_path, tokenizer):
    file = tmp_path / "lists.jsonl"
    rows = [row(["one", "three three", "two"], [1, 3, 2]), row(["no", "yes"], [0.5, 4])]
    file.write_text("\n".join(map(json.dumps, rows)))
    train = prepared(file, "rm", tokenizer).train
    first, second = train[0][0].paths, train[1][0].paths
    assert [path.name for path in first] == ["candidate-0", "candidate-1", "candidate-2"]
    assert [path.score for path in first] == [3.0, 2.0, 1.0] and [path.score for path in second] == [4.0, 0.5]
    said = [tokenizer.decode([i for i, w in zip(path.ids, path.weights) if w]) for path in first]
    assert said == [f"{text}<|im_end|>\n" for text in ("three three", "two", "one")]
    prompts = {tuple(i for i, w in zip(path.ids, path.weights) if not w) for path in first}
    assert len(prompts) == 1


def test_bad_rows_are_counted_by_reason_and_a_bad_file_is_refused(tmp_path, tokenizer):
    file = tmp_path / "lists.jsonl"
    good, bad = row(["a", "b"], [1, 0]), row(["a", "b"], [1, 1])
    file.write_text("\n".join(map(json.dumps, [good, good, bad, good])))
    with pytest.raises(DataError, match=r"(?s)1 of 4 rows cannot be used.*all scores are equal: .*lists\.jsonl:3"):
        prepared(file, "rm", tokenizer)
    report = prepared(file, "rm", tokenizer, max_bad_rows=0.5).report
    assert report.total.bad["all scores are equal"].count == 1


def test_a_stage_of_one_answer_says_what_it_was_given(tmp_path, tokenizer):
    file = tmp_path / "lists.jsonl"
    file.write_text(json.dumps(row(["a", "b", "c"], [1, 0, 2])))
    with pytest.raises(DataError, match=r"3 answers a row \(candidate-0, .*takes 1"):
        prepared(file, "sft", tokenizer)
