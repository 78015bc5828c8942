"""Speculative rounds: what a row must bring, the context beside it, and how requests stay together."""

from __future__ import annotations

import json

import numpy as np
import pytest

from luthier.core.errors import DataError
from luthier.core.registry import find
from luthier.data.bare import Bare
from luthier.data.encode import prepare
from luthier.data.groups import PLACE
from luthier.data.source import BadRow, Columns, DataConfig
from luthier.objectives.accept_head import SCORE, AcceptHead, AcceptHeadConfig, overhang
from luthier.objectives.sft import Sft
from tests.conftest import build_tokenizer

CONTEXT = {"user_text": "What is it?", "assistant_text": " hello world goodbye hello world"}
GOOD = {
    "idx": 0,
    "req_id": "8",
    "context_len": 30,
    "spd_round_draft_ids": [31, 27, 149],
    "spd_round_verifier_ids": [31, 28, 149],
    "mismatch_index": [1],
    "mismatch_score": ["4"],
}


def read(**changes):
    row = {**CONTEXT, **GOOD, PLACE: "train.jsonl:3", **changes}
    return find("formats", "accept_head").read(row, Columns())


def test_a_round_as_the_format_is_described():
    extra = read(spd_round_verifier_ids=[31, 28, 150, 7], mismatch_index=[2, 1], mismatch_score=["10", 2.5]).extra
    assert extra["text"] == "USER: What is it?\nASSISTANT: h"
    assert extra["mismatches"] == [{"index": 1, "target": 0.25}, {"index": 2, "target": 1.0}]
    assert extra["unscored"] is None and extra["place"] == "train.jsonl:3"


def test_logged_ids_win_over_text_and_measures_come_along():
    logged = {"prompt_ids": [9, 8], "answer_ids": [7, 6, 5], "context_ids_len": 3, "mismatch_kl": [1.5]}
    extra = read(**logged, mismatch_rank=[2]).extra
    assert extra["context_ids"] == [9, 8, 7] and "text" not in extra
    assert extra["mismatches"] == [{"index": 1, "target": 0.4, "kl": 1.5, "rank": 2}]


def test_the_first_mismatch_nobody_scored_is_known():
    assert read(spd_round_verifier_ids=[30, 28, 149]).extra["unscored"] == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"req_id": None}, "no req_id"),
        ({"user_text": None, "assistant_text": None}, "user_text or assistant_text is no text"),
        ({"context_len": 71}, "context_len is beyond the end of the context"),
        ({"context_len": 0}, "context_len is no whole number of 1 or more"),
        ({"context_len": "30"}, "context_len is no whole number of 1 or more"),
        ({"mismatch_index": [3]}, "mismatch_index is out of range"),
        ({"mismatch_index": [-1]}, "mismatch_index is out of range"),
        ({"mismatch_index": [1, 1], "mismatch_score": [1, 1]}, "mismatch_index names a position twice"),
        ({"mismatch_score": []}, "mismatch_index and mismatch_score have unequal lengths"),
        ({"mismatch_score": ["11"]}, "mismatch_score is no number from 0 to 10"),
        ({"mismatch_score": ["good"]}, "mismatch_score is no number from 0 to 10"),
        ({"mismatch_score": [float("nan")]}, "mismatch_score is no number from 0 to 10"),
        ({"mismatch_score": [True]}, "mismatch_score is no number from 0 to 10"),
        ({"spd_round_verifier_ids": [31, 27, 149]}, "draft and verifier are equal at a mismatch"),
        ({"spd_round_verifier_ids": [31]}, "spd_round_verifier_ids has another length than spd_round_draft_ids"),
        ({"spd_round_draft_ids": []}, "spd_round_draft_ids is no list of token ids"),
        ({"spd_round_draft_ids": [31, "x", 149]}, "spd_round_draft_ids holds something that is no token id"),
        ({"context_ids_len": 1, "prompt_ids": None}, "prompt_ids is no list of token ids"),
        ({"context_ids_len": 1, "prompt_ids": ["x"]}, "prompt_ids holds something that is no token id"),
        ({"context_ids_len": 1, "prompt_ids": [1], "answer_ids": 5}, "answer_ids is no list of token ids"),
        ({"mismatch_kl": [1, 2]}, "mismatch_kl and mismatch_index have unequal lengths"),
    ],
)
def test_what_cannot_be_used_is_told_by_its_reason(changes, reason):
    with pytest.raises(BadRow) as caught:
        read(**changes)
    assert caught.value.reason == reason


def write(folder, rows, contexts):
    for name, content in (("train.jsonl", rows), ("context.jsonl", contexts)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")


def prepared(folder, *, stage=None, cutoff_len=256, keys=None, **data):
    entry = {"path": str(folder / "train.jsonl"), "format": "accept_head"}
    config = DataConfig(dataset=[entry], data_cache_dir=str(folder / "cache"), **data)
    objective = stage or AcceptHead(AcceptHeadConfig(**(keys or {})))
    return prepare(config, objective, Bare(build_tokenizer()), cutoff_len=cutoff_len, seed=1)


def requests(count, rounds):
    """Rounds of several requests, taking turns."""
    rows = [GOOD | {"idx": n, "req_id": str(n % count), "context_len": 20 + n % 20} for n in range(count * rounds)]
    return rows, [{"req_id": str(n), **CONTEXT} for n in range(count)]


def told(encoded_set):
    return [entry for i in range(len(encoded_set)) for entry in encoded_set[i][0].extra["rounds"]]


def test_rounds_of_a_request_are_one_tree_and_a_split_keeps_them_together(tmp_path):
    write(tmp_path, *requests(10, 6))
    data = prepared(tmp_path, val_size=0.3, keys={"accept_rounds_per_tree": 4})
    sides = [{entry["req_id"] for entry in told(part)} for part in (data.train, data.eval[""])]
    assert (len(sides[0]), len(sides[1])) == (7, 3) and not sides[0] & sides[1]
    assert sorted(e["row"] for part in (data.train, data.eval[""]) for e in told(part)) == list(range(1, 61))
    assert len(data.train) == 14  # seven requests of six rounds, four and two in a tree
    assert data.report.total.rows == 60


def test_any_number_of_workers_and_any_batch_gives_the_same_trees(tmp_path):
    write(tmp_path, *requests(7, 5))
    found = []
    for number, keys in enumerate(
        ({}, {"preprocessing_batch_size": 6}, {"preprocessing_batch_size": 3, "preprocessing_num_workers": 2})
    ):
        train = prepared(tmp_path, overwrite_cache=bool(number), **keys).train
        found.append([(train[i][1], [path.ids for path in train[i][0].paths]) for i in range(len(train))])
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 7


def test_bad_rounds_are_counted_and_matched_ones_kept_for_the_figures(tmp_path):
    rows, contexts = requests(2, 4)
    rows[2] |= {"mismatch_score": ["12"]}
    rows[3] |= {"req_id": "unknown"}
    rows[4] |= {"mismatch_index": [], "mismatch_score": [], "spd_round_verifier_ids": [31, 27, 149]}
    write(tmp_path, rows, contexts)
    with pytest.raises(
        DataError, match=r"(?s)2 of 8 rows cannot be used.*train\.jsonl:3.*train\.jsonl:4 \(req_id 'unk"
    ):
        prepared(tmp_path)
    data = prepared(tmp_path, max_bad_rows=0.5)
    assert {reason: bad.count for reason, bad in data.report.total.bad.items()} == {
        "mismatch_score is no number from 0 to 10": 1,
        "its req_id has no context": 1,
    }
    assert data.report.total.idle_rows == 1
    assert "1 rows are in order and bring nothing to train" in " ".join(str(data.report).split())
    assert [entry["mismatches"] for entry in told(data.train) if entry["row"] == 5] == [[]]
    assert sum(len(data.train[i][0].paths) for i in range(len(data.train))) == 5


def test_no_context_file(tmp_path):
    write(tmp_path, *requests(1, 2))
    (tmp_path / "context.jsonl").unlink()
    with pytest.raises(DataError, match=r"context\.jsonl does not exist.*same req_id"):
        prepared(tmp_path)


def test_a_broken_line_of_the_context_file_is_named(tmp_path):
    write(tmp_path, *requests(2, 2))
    with (tmp_path / "context.jsonl").open("a") as file:
        file.write("{oops\n")
    with pytest.raises(DataError, match=r"context\.jsonl, line 3"):
        prepared(tmp_path)


def test_a_request_told_twice_must_be_told_the_same(tmp_path):
    rows, contexts = requests(1, 2)
    write(tmp_path, rows, [*contexts, *contexts])
    assert len(prepared(tmp_path).train) == 1
    write(tmp_path, rows, [*contexts, contexts[0] | {"user_text": "Other"}])
    with pytest.raises(DataError, match=r"context\.jsonl, line 2: req_id '0' was there before"):
        prepared(tmp_path)


def test_ids_of_another_tokenizer(tmp_path):
    rows, contexts = requests(1, 3)
    rows[1] |= {"spd_round_draft_ids": [31, 128009, 149]}
    write(tmp_path, rows, contexts)
    with pytest.raises(DataError, match=r"train\.jsonl:2: token id 128009 is outside the vocabulary of 400 tokens"):
        prepared(tmp_path)


def test_another_stage_says_that_rounds_are_not_for_it(tmp_path):
    write(tmp_path, *requests(1, 3))
    with pytest.raises(DataError, match="brings no answer, the stage needs 1"):
        prepared(tmp_path, stage=Sft())


def test_other_rows_are_refused_by_this_stage(tmp_path):
    file = tmp_path / "alpaca.jsonl"
    file.write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    config = DataConfig(dataset=[str(file)], data_cache_dir=str(tmp_path))
    with pytest.raises(DataError, match="takes none: it reads data sets of another format"):
        prepare(config, AcceptHead(), Bare(build_tokenizer()), cutoff_len=64, seed=0)


def test_long_contexts_lose_their_beginning_in_steps_that_rounds_share(tmp_path):
    rows, _ = requests(1, 9)
    long = {"req_id": "0", "user_text": "u", "assistant_text": " hello world goodbye" * 40}
    rows = [row | {"context_len": 700 + n} for n, row in enumerate(rows)]
    write(tmp_path, rows, [long])
    data = prepared(tmp_path, cutoff_len=40)
    paths = [path for i in range(len(data.train)) for path in data.train[i][0].paths]
    assert all(20 < len(path.ids) <= 40 for path in paths)
    assert all(np.nansum(path.columns[SCORE]) == 0.4 for path in paths), "no label is ever cut away"
    assert data.report.total.truncated_rows == 9
    assert [overhang(n, 40) for n in (39, 40, 41, 60, 61)] == [0, 0, 20, 20, 40]


def test_changing_the_context_file_encodes_again(tmp_path):
    rows, contexts = requests(1, 2)
    write(tmp_path, rows, contexts)
    before = prepared(tmp_path).train[0][0].paths[0].ids
    write(tmp_path, rows, [contexts[0] | {"user_text": "Who was it?"}])
    assert prepared(tmp_path).train[0][0].paths[0].ids != before


def test_a_folder_of_both_files(tmp_path):
    write(tmp_path, *requests(3, 2))
    config = DataConfig(dataset=[{"path": str(tmp_path), "format": "accept_head"}], data_cache_dir=str(tmp_path / "c"))
    assert len(prepare(config, AcceptHead(), Bare(build_tokenizer()), cutoff_len=128, seed=0).train) == 3
