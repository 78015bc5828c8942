"""prepare: rows to encoded sets. The stage and the renderer here are bytes, so that the ids can be told by eye."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest

from luthier.core.errors import ConfigError, DataError, TemplateError
from luthier.core.locks import locked
from luthier.core.objective import Objective
from luthier.core.types import Column, Encoded
from luthier.core.types import Path as TokenPath
from luthier.data import cache
from luthier.data.encode import prepare
from luthier.data.renderer import make_renderer
from luthier.data.source import DataConfig
from luthier.data.template import TemplateConfig
from luthier.objectives.sft import Sft
from tests.conftest import build_tokenizer


class Vocabulary:
    """A tokenizer as far as the cache key asks for one."""

    added_tokens_decoder: dict = {}

    def __init__(self, size=256):
        self.init_kwargs = {"size": size}

    def get_vocab(self):
        return {str(n): n for n in range(self.init_kwargs["size"])}


@dataclass
class Bytes:
    """A renderer: UTF-8 bytes; 0 ends a message. Refuses the text `unrenderable`."""

    print_: str = "bytes"
    tokenizer: Vocabulary = field(default_factory=Vocabulary)
    efficient_eos: bool = False

    def fingerprint(self):
        return self.print_

    def oneturn(self, messages, *, system="", tools=""):
        if any(message.content == "unrenderable" for message in messages):
            raise TemplateError("no such text")
        ids = [[*message.content.encode(), 0] for message in messages]
        return [i for part in ids[:-1] for i in part], ids[-1]


@dataclass(frozen=True)
class Keys:
    scale: float = 1.0


class Copy(Objective):
    """Trains the answers: [prompt, 0, answer, 0], cut from the right."""

    Config = Keys
    answers = (1, 2)

    def encode(self, example, renderer, *, cutoff_len):
        paths, cut = [], 0
        for answer in example.answers:
            prompt, response = renderer.oneturn((*example.prompt, *answer.messages))
            ids = (prompt + response)[:cutoff_len]
            cut += len(prompt) + len(response) - len(ids)
            if len(ids) <= len(prompt):
                return []
            paths.append(
                TokenPath(ids, [0.0] * len(prompt) + [1.0] * (len(ids) - len(prompt)), answer.name, answer.score)
            )
        return [Encoded(tuple(paths), cut)]

    def loss(self, policy, batch):
        raise NotImplementedError


class Halves(Copy):
    """Two examples for every row."""

    def encode(self, example, renderer, *, cutoff_len):
        whole = super().encode(example, renderer, cutoff_len=cutoff_len)
        return [*whole, *whole]


class Judged(Copy):
    """Trains no tokens but a value at each, with a number beside the answers."""

    columns = (Column("value"), Column("other", "float64"))

    def encode(self, example, renderer, *, cutoff_len):
        ids = [*example.prompt[0].content.encode()]
        values = [float("nan"), *(0.5 * i for i in range(1, len(ids)))]
        return [Encoded((TokenPath(ids, [0.0] * len(ids), "round", 2.0, {"value": values}),), 0, {"margin": 0.25})]


class Masked(Copy):
    """Trains nothing at all."""

    def encode(self, example, renderer, *, cutoff_len):
        return [Encoded((TokenPath([1, 2, 3], [1.0, 0.0, 0.0]),))]


ROWS = [{"instruction": f"question {n}", "input": "", "output": f"answer {n}" * (n % 3 + 1)} for n in range(20)]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with rows.jsonl, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines(tmp_path / "rows.jsonl", ROWS)
    return tmp_path


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(dataset, objective=None, renderer=None, cutoff_len=2048, seed=1, **keys):
    config = DataConfig(dataset=dataset if isinstance(dataset, list) or dataset is None else str(dataset), **keys)
    return prepare(config, objective or Copy(), renderer or Bytes(), cutoff_len=cutoff_len, seed=seed)


def expected(row):
    prompt, response = [*row["instruction"].encode(), 0], [*row["output"].encode(), 0]
    return prompt + response, [0.0] * len(prompt) + [1.0] * len(response)


def ids(encoded_set):
    return [encoded_set[i][0].paths[0].ids for i in range(len(encoded_set))]


def stored(home):
    return sorted(path.name for path in (home / "cache" / "luthier" / "encoded").iterdir() if path.is_dir())


def test_what_is_stored_is_what_was_encoded(home):
    data = prepared(home / "rows.jsonl", preprocessing_batch_size=7)
    assert len(data.train) == 20
    for n, row in enumerate(ROWS):
        encoded, origin = data.train[n]
        (path,) = encoded.paths
        assert (path.ids, path.weights) == expected(row)
        assert path.name == "response"
        assert np.isnan(path.score)
        assert origin == f"{home / 'rows.jsonl'}:{n + 1}"
    lengths = [len(expected(row)[0]) for row in ROWS]
    for counts in (data.train.tree_tokens, data.train.path_tokens, data.train.longest):
        assert counts.dtype == np.int64
        assert counts.tolist() == lengths
    assert data.train.answers.tolist() == [1] * 20
    assert data.eval == {}


def test_pairs_share_their_beginning(home):
    rows = [
        {"instruction": "same", "chosen": "ab", "rejected": "ac"},
        {"instruction": "x", "chosen": "y", "rejected": "zz"},
    ]
    data = prepared([{"path": lines(home / "pairs.jsonl", rows), "ranking": True}])
    encoded, _ = data.train[0]
    assert [(path.name, path.score) for path in encoded.paths] == [("chosen", 1.0), ("rejected", 0.0)]
    assert [bytes(path.ids) for path in encoded.paths] == [b"same\0ab\0", b"same\0ac\0"]
    assert data.train.path_tokens.tolist() == [16, 4 + 5]
    assert data.train.tree_tokens.tolist() == [6 + 2 + 2, 2 + 2 + 3]
    assert data.train.longest.tolist() == [8, 5]
    assert data.train.answers.tolist() == [2, 2]


def test_columns_and_numbers_beside_the_answers(home):
    data = prepared(home / "rows.jsonl", Judged())
    encoded, _ = data.train[3]
    (path,) = encoded.paths
    assert encoded.extra == {"margin": 0.25}
    assert path.score == 2.0
    assert set(path.columns) == {"value", "other"}
    assert np.isnan(path.columns["other"]).all()
    assert np.isnan(path.columns["value"][0])
    assert path.columns["value"][1:] == [0.5 * i for i in range(1, len(path.ids))]


def test_sets_can_be_sent_to_other_processes(home):
    train = prepared(home / "rows.jsonl").train
    train[3]
    again = pickle.loads(pickle.dumps(train))
    assert ids(again) == ids(train)
    assert again.fingerprint == train.fingerprint


def test_any_number_of_workers_gives_the_same(home):
    bad = [{"instruction": 1, "output": "x"}, {"instruction": "q"}, {"instruction": "", "output": "a"}]
    file = lines(home / "mixed.jsonl", [row for n, good in enumerate(ROWS) for row in (good, bad[n % 3])])
    keys = {"preprocessing_batch_size": 3, "max_bad_rows": 0.6, "overwrite_cache": True}
    one = prepared(file, **keys)
    content = {path.name: path.read_bytes() for path in one.train.stores[0].folder.iterdir()}
    one_ids = ids(one.train)
    two = prepared(file, preprocessing_num_workers=2, **keys)
    assert {path.name: path.read_bytes() for path in two.train.stores[0].folder.iterdir()} == content
    assert ids(two.train) == one_ids == [expected(row)[0] for row in ROWS]
    assert str(one.report) == str(two.report)


def test_errors_of_workers_arrive(home):
    file = home / "broken.jsonl"
    file.write_text((home / "rows.jsonl").read_text() + "{oops\n")
    with pytest.raises(DataError, match=r"broken\.jsonl, line 21, column 2"):
        prepared(file, preprocessing_num_workers=2, preprocessing_batch_size=4)


class Dies(Copy):
    def encode(self, example, renderer, *, cutoff_len):
        os._exit(9)


class Fails(Copy):
    def encode(self, example, renderer, *, cutoff_len):
        raise ZeroDivisionError("in the stage")


def test_a_worker_that_dies_is_reported(home):
    with pytest.raises(DataError, match="died, most likely for want of memory"):
        prepared(home / "rows.jsonl", Dies(), preprocessing_num_workers=2, preprocessing_batch_size=5)


def test_a_mistake_in_a_stage_keeps_its_own_error_and_names_the_row(home):
    with pytest.raises(ZeroDivisionError, match="in the stage") as caught:
        prepared(home / "rows.jsonl", Fails())
    assert caught.value.__notes__ == [f"while encoding {home / 'rows.jsonl'}:1"]
    assert stored(home) == []


def test_bad_rows_are_counted_by_reason_and_named(home):
    bad = [{"instruction": "q", "output": 3}, {"instruction": "q", "output": "unrenderable"}, {"instruction": "q"}]
    file = lines(home / "some.jsonl", ROWS + bad + bad[:1] * 4)
    data = prepared(file, max_bad_rows=0.5)
    assert ids(data.train) == [expected(row)[0] for row in ROWS]
    found = {reason: (entry.count, entry.first) for reason, entry in data.report.sets[file].bad.items()}
    assert found == {
        "response is not text": (5, [f"{file}:21 (3 (int))", f"{file}:24 (3 (int))", f"{file}:25 (3 (int))"]),
        "brings no answer, the stage needs 1": (1, [f"{file}:23"]),
        "the template cannot render it": (1, [f"{file}:22 (no such text)"]),
    }
    assert "5 rows: response is not text" in str(data.report).replace("\n", " ")
    with pytest.raises(DataError) as caught:
        prepared(file, max_bad_rows=0.2)
    for part in ("7 of 27 rows", "max_bad_rows: 0.2", "5 rows: response is not text", f"{file}:22"):
        assert part in str(caught.value)


def test_one_percent_of_bad_rows_is_allowed(home):
    many = ROWS * 5
    assert len(prepared(lines(home / "a.jsonl", [*many[:99], {"instruction": "q", "output": 3}])).train) == 99
    with pytest.raises(DataError, match="2 of 100 rows"):
        prepared(lines(home / "b.jsonl", [*many[:98], *[{"instruction": "q", "output": 3}] * 2]))


def test_truncation_is_counted(home):
    rows = [{"instruction": "qq", "output": "a" * n} for n in (1, 5, 9)]
    data = prepared(lines(home / "a.jsonl", rows), cutoff_len=6)
    assert data.train.longest.tolist() == [5, 6, 6]
    total = data.report.total
    assert (total.rows, total.items, total.truncated_rows, total.truncated_tokens) == (3, 3, 2, 3 + 7)
    assert (total.tokens, total.supervised) == (17, 2 + 3 + 3)


def test_a_cutoff_shorter_than_the_prompts(home):
    with pytest.raises(DataError) as caught:
        prepared(home / "rows.jsonl", cutoff_len=5)
    for part in ("20 of 20 rows", "nothing left to train after truncation to cutoff_len=5", "raise cutoff_len"):
        assert part in str(caught.value)


def test_all_masked_data_are_refused(home):
    for share in (0.01, 1.0):
        with pytest.raises(DataError, match="nothing (is )?left to train"):
            prepared(home / "rows.jsonl", Masked(), max_bad_rows=share)


def test_more_answers_than_the_stage_takes(home):
    class One(Copy):
        answers = (1, 1)

    file = lines(home / "pairs.jsonl", [{"instruction": "q", "chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match=r"brings 2 answers a row \(chosen, rejected\), and stage test_encode takes 1"):
        prepared([{"path": file, "ranking": True}], One())


def test_wrong_column_names(home):
    file = lines(home / "a.jsonl", [{"instrution": "q", "output": "a"}] * 3)
    with pytest.raises(DataError) as caught:
        prepared([{"path": file, "format": "alpaca"}])
    for part in (
        "no column 'instruction'",
        "Did you mean 'instrution'?",
        "instrution, output",
        "columns: {prompt: ...}",
    ):
        assert part in str(caught.value)
    file = lines(home / "b.jsonl", [{"instruction": "q", "outputs": "a"}] * 3)
    with pytest.raises(DataError, match="every row brings no answer.*Did you mean 'outputs'"):
        prepared(file)
    columns = {"prompt": "instruction", "response": "output", "system": "sytem"}
    rows = [row | {"system": "s"} for row in ROWS]
    with pytest.raises(DataError, match="no row has: sytem. Did you mean 'system'"):
        prepared([{"path": lines(home / "c.jsonl", rows), "columns": columns}])


def test_pairs_that_are_not_named_as_such(home):
    class Two(Copy):
        answers = (2, 2)

    file = lines(home / "pairs.jsonl", [{"instruction": "q", "chosen": "a", "rejected": "b"}] * 3)
    with pytest.raises(DataError, match=r"needs 2 .*with ranking: true and columns: \{chosen: \.\.\., rejected"):
        prepared([{"path": file, "columns": {"prompt": "instruction"}}], Two())
    with pytest.raises(DataError, match=r"brings 1 answer, the stage needs 2 .*with ranking: true"):
        prepared(home / "rows.jsonl", Two())


def test_columns_that_only_later_rows_have_are_no_mistake(home):
    columns = {"prompt": "instruction", "response": "output", "system": "s"}
    file = lines(home / "c.jsonl", [*ROWS, {"instruction": "q", "output": "a", "s": "late"}])
    assert len(prepared([{"path": file, "columns": columns}]).train) == 21


def test_no_data_at_all(home):
    with pytest.raises(ConfigError, match="dataset: is not set"):
        prepared(None)


# Mixing, splitting, evaluating


def test_max_samples_and_num_samples(home):
    assert ids(prepared(home / "rows.jsonl", max_samples=4).train) == [expected(row)[0] for row in ROWS[:4]]
    drawn = prepared([{"path": str(home / "rows.jsonl"), "num_samples": 30}], seed=5)
    found = ids(drawn.train)
    assert len(found) == 30
    assert sorted(set(map(bytes, found))) == sorted(bytes(expected(row)[0]) for row in ROWS)
    assert drawn.report.total.rows == 20


def test_mixing_weights_and_order(home):
    other = lines(home / "other.jsonl", [{"instruction": f"o{n}", "output": "x"} for n in range(3)])
    data = prepared([str(home / "rows.jsonl"), other], mix_strategy="interleave_under")
    assert [origin.rpartition("/")[2] for origin in (data.train[i][1] for i in range(len(data.train)))] == [
        f"{name}.jsonl:{n}" for n in (1, 2, 3) for name in ("rows", "other")
    ]
    assert len(prepared([{"path": other, "weight": 3}]).train) == 9
    assert len(prepared(f"{other},{other}").train) == 6


def test_splitting_off_rows(home):
    data = prepared(home / "rows.jsonl", Halves(), val_size=0.25)
    held = data.eval[""]
    assert (len(data.train), len(held)) == (30, 10)
    origins = [{part[i][1] for i in range(len(part))} for part in (data.train, held)]
    assert len(origins[0] | origins[1]) == 20
    assert not origins[0] & origins[1]
    again = prepared(home / "rows.jsonl", Halves(), val_size=0.25)
    other = prepared(home / "rows.jsonl", Halves(), val_size=0.25, seed=2)
    assert again.eval[""].fingerprint == held.fingerprint != other.eval[""].fingerprint
    assert len(stored(home)) == 1, "splitting differently encodes nothing again"


def test_evaluation_sets(home):
    other = lines(home / "other.jsonl", [{"instruction": "o", "output": "x"}] * 3)
    files = [str(home / "rows.jsonl"), {"path": other, "name": "small"}]
    together = prepared(home / "rows.jsonl", eval_dataset=files)
    assert {name: len(part) for name, part in together.eval.items()} == {"": 23}
    each = prepared(None, eval_dataset=files, eval_on_each_dataset=True)
    assert {name: len(part) for name, part in each.eval.items()} == {str(home / "rows.jsonl"): 20, "small": 3}
    assert each.train is None
    with pytest.raises(ConfigError, match="weight has no meaning in eval_dataset"):
        prepared(home / "rows.jsonl", eval_dataset=[{"path": other, "weight": 2}])


def test_one_file_read_in_two_ways(home):
    rows = [{"instruction": "a", "text": "b", "output": "c"}] * 2
    file = lines(home / "a.jsonl", rows)
    data = prepared([file, {"path": file, "columns": {"prompt": "text", "response": "output"}}])
    assert [bytes(found) for found in ids(data.train)] == [b"a\0c\0"] * 2 + [b"b\0c\0"] * 2
    assert list(data.report.sets) == [file, f"{file} (2)"]


# The cache


def test_the_same_content_is_encoded_once(home, monkeypatch):
    prepared(home / "rows.jsonl")
    (key,) = stored(home)
    before = (home / "cache/luthier/encoded" / key / "items.arrow").stat().st_mtime_ns
    started = time.perf_counter()
    shutil.move(home / "rows.jsonl", home / "moved.jsonl")
    data = prepared(home / "moved.jsonl", Copy(), preprocessing_batch_size=3, max_bad_rows=0.5, val_size=2)
    assert time.perf_counter() - started < 2
    assert stored(home) == [key]
    assert (home / "cache/luthier/encoded" / key / "items.arrow").stat().st_mtime_ns == before
    assert data.train[0][1].startswith(str(home / "moved.jsonl"))
    prepared(home / "moved.jsonl", overwrite_cache=True)
    assert stored(home) == [key]
    assert (home / "cache/luthier/encoded" / key / "items.arrow").stat().st_mtime_ns > before


def same(home):
    return {"dataset": [str(home / "rows.jsonl")]}


CHANGES = {
    "a row": lambda home: {"dataset": [lines(home / "rows.jsonl", [{**ROWS[0], "output": "other"}, *ROWS[1:]])]},
    "columns": lambda home: {
        "dataset": [{"path": str(home / "rows.jsonl"), "columns": {"prompt": "instruction", "response": "output"}}]
    },
    "fewer rows": lambda home: {"max_samples": 19},
    "cutoff_len": lambda home: {"cutoff_len": 2047},
    "template": lambda home: {"renderer": Bytes("other")},
    "tokenizer": lambda home: {"renderer": Bytes(tokenizer=Vocabulary(257))},
    "a key of the stage": lambda home: {"objective": Copy(Keys(scale=2.0))},
    "the stage": lambda home: {"objective": Halves()},
    "another kind of file": lambda home: {"dataset": [as_json(home)]},
}

UNRELATED = {
    "where the cache lies is not part of it": lambda home: {"data_cache_dir": str(home / "cache/luthier/encoded")},
    "batch size": lambda home: {"preprocessing_batch_size": 2},
    "workers": lambda home: {"preprocessing_num_workers": 2, "preprocessing_batch_size": 10},
    "seed": lambda home: {"seed": 77},
    "val_size": lambda home: {"val_size": 3},
    "weight": lambda home: {"dataset": [{"path": str(home / "rows.jsonl"), "weight": 2}]},
    "name": lambda home: {"dataset": [{"path": str(home / "rows.jsonl"), "name": "other"}]},
    "max_bad_rows": lambda home: {"max_bad_rows": 0.5},
    "max_samples that take all": lambda home: {"max_samples": 20},
    "lock": lambda home: {"data_shared_file_system": True},
}


def as_json(home):
    (home / "rows.json").write_text(json.dumps(ROWS))
    return str(home / "rows.json")


@pytest.mark.parametrize("what", CHANGES)
def test_the_key_changes_with(home, what):
    prepared(**same(home))
    prepared(**same(home) | CHANGES[what](home))
    assert len(stored(home)) == 2


@pytest.mark.parametrize("what", UNRELATED)
def test_the_key_does_not_change_with(home, what):
    prepared(**same(home))
    prepared(**same(home) | UNRELATED[what](home))
    assert len(stored(home)) == 1


def test_the_key_changes_with_the_code(home, monkeypatch):
    prepared(**same(home))
    monkeypatch.setattr(cache, "_code", lambda: "other code")
    prepared(**same(home))
    assert len(stored(home)) == 2


def test_the_key_of_a_real_tokenizer(tokenizer):
    from tests.conftest import build_tokenizer

    first = cache._tokenizer(tokenizer)
    padded = build_tokenizer()
    padded(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert cache._tokenizer(padded) == first
    more = build_tokenizer()
    more.add_tokens(["newword"])
    assert cache._tokenizer(more) != first


def test_a_build_that_is_interrupted_leaves_nothing_to_be_taken_for_whole(home, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("luthier.data.encoder.table", stop)
        with pytest.raises(KeyboardInterrupt):
            prepared(home / "rows.jsonl")
    assert stored(home) == []
    (home / "cache/luthier/encoded" / "leftover").mkdir()
    assert len(prepared(home / "rows.jsonl").train) == 20


def test_a_cache_folder_that_cannot_be_written(home):
    (home / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written.*data_cache_dir"):
        prepared(home / "rows.jsonl", data_cache_dir=str(home / "file" / "below"))


class Slow(Copy):
    """Leaves a mark for every encoding of a row."""

    def encode(self, example, renderer, *, cutoff_len):
        time.sleep(0.02)
        with open(os.environ["MARKS"], "a") as file:
            file.write("x")
        return super().encode(example, renderer, cutoff_len=cutoff_len)


def _prepare_elsewhere(file, queue):
    queue.put(ids(prepared(file, Slow()).train))


def test_two_processes_encode_once(home, monkeypatch):
    monkeypatch.setenv("MARKS", str(home / "marks"))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    others = [context.Process(target=_prepare_elsewhere, args=(str(home / "rows.jsonl"), queue)) for _ in range(2)]
    for other in others:
        other.start()
    found = [queue.get(timeout=60) for _ in others]
    for other in others:
        other.join(timeout=60)
    assert found == [[expected(row)[0] for row in ROWS]] * 2
    assert len((home / "marks").read_text()) == 20


def test_a_build_that_broke_off_between_its_files_is_done_again(home, monkeypatch):
    def breaks_off(source, target):
        os.rename(source, target)
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(DataError, match="No space left"):
        patch.setattr(cache.os, "replace", breaks_off)
        prepared(home / "rows.jsonl")
    assert len(list(cache.cache_folder(DataConfig()).glob("*/*"))) == 1, "one of two files is in place"
    assert ids(prepared(home / "rows.jsonl").train) == [expected(row)[0] for row in ROWS]


# tokenized_path


def test_processes_write_one_tokenized_path_one_after_the_other(home):
    """With overwrite_cache each would otherwise take away what the others are about to look at."""
    keys = {"tokenized_path": str(home / "done"), "overwrite_cache": True}
    prepared(home / "rows.jsonl", **keys)
    before = (home / "done" / "prepared.json").stat().st_ino
    lock = cache.cache_folder(DataConfig()) / f"{cache.sha(str(home / 'done'))}.lock"
    with ThreadPoolExecutor(1) as pool:
        with locked(lock, logging.getLogger("test"), "writing"):
            other = pool.submit(prepared, home / "rows.jsonl", **keys)
            with pytest.raises(TimeoutError):
                other.result(timeout=1)
            assert (home / "done" / "prepared.json").stat().st_ino == before
        assert len(other.result(timeout=60).train) == len(ROWS)
    assert ids(prepared(home / "rows.jsonl", tokenized_path=keys["tokenized_path"]).train) == [
        expected(row)[0] for row in ROWS
    ]


def test_tokenized_path_is_written_and_loaded(home):
    keys = {"val_size": 4, "tokenized_path": str(home / "done")}
    first = prepared(home / "rows.jsonl", **keys)
    shutil.rmtree(home / "cache")
    second = prepared(home / "rows.jsonl", **keys)
    assert not (home / "cache").exists(), "loaded, not encoded again"
    assert ids(second.train) == ids(first.train)
    assert ids(second.eval[""]) == ids(first.eval[""])
    assert second.train[0][1] == first.train[0][1]
    assert str(second.report) == str(first.report)
    without_data = prepared(None, tokenized_path=str(home / "done"))
    assert without_data.train.fingerprint == first.train.fingerprint


@pytest.mark.parametrize(
    ("changed", "expected_part"),
    [
        ({"cutoff_len": 99}, "cutoff_len was 2048, is 99"),
        ({"renderer": Bytes("other")}, "the template changed"),
        ({"renderer": Bytes(tokenizer=Vocabulary(9))}, "the tokenizer changed"),
        ({"objective": Copy(Keys(scale=3.0))}, 'keys of the stage was {"scale": 1.0}, is {"scale": 3.0}'),
        ({"max_samples": 3}, "max_samples was null, is 3"),
        ({"val_size": 3.0}, "val_size was 0.0, is 3.0"),
    ],
)
def test_tokenized_path_names_what_changed(home, changed, expected_part):
    keys = {"tokenized_path": str(home / "done")}
    prepared(home / "rows.jsonl", **keys)
    with pytest.raises(DataError) as caught:
        prepared(home / "rows.jsonl", **keys | changed)
    assert expected_part in str(caught.value)
    assert "overwrite_cache" in str(caught.value)
    if "max_samples" not in changed and "val_size" not in changed:
        with pytest.raises(DataError, match="was made with other"):
            prepared(None, **keys | changed)
    anew = prepared(home / "rows.jsonl", **keys | changed, overwrite_cache=True)
    assert ids(prepared(home / "rows.jsonl", **keys | changed).train) == ids(anew.train)


def test_tokenized_path_with_other_rows(home):
    keys = {"tokenized_path": str(home / "done")}
    prepared(home / "rows.jsonl", **keys)
    lines(home / "rows.jsonl", ROWS[1:])
    with pytest.raises(DataError, match=r"file 1 of dataset\[0\] changed"):
        prepared(home / "rows.jsonl", **keys)


def test_tokenized_path_never_touches_a_folder_of_somebody_else(home):
    (home / "mine").mkdir()
    (home / "mine" / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="holds no encoded data"):
            prepared(home / "rows.jsonl", tokenized_path=str(home / "mine"), overwrite_cache=overwrite)
    assert (home / "mine" / "thesis.txt").read_text() == "precious"
    (home / "empty").mkdir()
    prepared(home / "rows.jsonl", tokenized_path=str(home / "empty"))
    assert (home / "empty" / "prepared.json").is_file()


# With the parts of the house that will use it


def test_a_renderer_that_can_be_warmed_is_asked_once_a_batch(home):
    calls = []

    @dataclass
    class Warmed(Bytes):
        def texts(self, example):
            return [message.content for message in (*example.prompt, *example.answers[0].messages)]

        def warm(self, texts):
            calls.append(list(texts))

    prepared(home / "rows.jsonl", renderer=Warmed(), preprocessing_batch_size=15)
    assert [len(call) for call in calls] == [30, 10]
    assert calls[0][:2] == ["question 0", "answer 0"]


def test_supervised_fine_tuning_with_a_real_template(home, tokenizer):
    from luthier.data.renderer import make_renderer
    from luthier.data.template import TemplateConfig
    from luthier.objectives.sft import Sft

    renderer = make_renderer(TemplateConfig(template="chatml"), tokenizer)
    data = prepared(home / "rows.jsonl", Sft(), renderer)
    for n, row in enumerate(ROWS):
        (path,) = data.train[n][0].paths
        prompt = f"<|im_start|>user\n{row['instruction']}<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(path.ids) == f"{prompt}{row['output']}<|im_end|>\n"
        trained = [token for token, weight in zip(path.ids, path.weights) if weight]
        assert tokenizer.decode(trained) == f"{row['output']}<|im_end|>\n"


def test_pre_training_on_lines_of_text(home, tokenizer):
    from luthier.data.renderer import make_renderer
    from luthier.data.template import TemplateConfig
    from luthier.objectives.pt import Pt

    (home / "a.txt").write_text("The quick brown fox.\n\njumps over the lazy dog " * 3)
    data = prepared(home / "a.txt", Pt(), make_renderer(TemplateConfig(template="empty"), tokenizer), cutoff_len=8)
    assert data.report.total.rows == 4
    assert len(data.train) > 4
    assert data.train[0][1] == f"{home / 'a.txt'}:1"
    assert {data.train[i][1] for i in range(len(data.train))} == {f"{home / 'a.txt'}:{n}" for n in (1, 3, 5, 7)}


def test_the_report_is_json(home):
    report = prepared(home / "rows.jsonl").report
    assert json.loads(json.dumps(report.to_dict()))["train"] == 20


def test_a_sparse_column_may_be_missing_from_the_first_rows(tmp_path):
    from luthier.data.encode import prepare
    from luthier.data.renderer import make_renderer
    from luthier.data.source import DataConfig
    from luthier.data.template import TemplateConfig
    from luthier.objectives.sft import Sft
    from tests.conftest import build_tokenizer

    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", "history": [["c", "d"]]}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "instruction", "response": "output", "history": "history"}
    data = DataConfig(
        dataset=[{"path": str(file), "format": "alpaca", "columns": columns}],
        max_samples=1,
        data_cache_dir=str(tmp_path / "cache"),
    )
    renderer = make_renderer(TemplateConfig(template="chatml"), build_tokenizer())
    assert len(prepare(data, Sft(), renderer, cutoff_len=50, seed=0).train) == 1


@pytest.mark.parametrize("form", ["sharegpt", "openai"])
def test_a_conversation_that_ends_with_the_user_trains_what_the_model_said_before(tmp_path, form):
    """Nothing is learnt of the last words, so that the row is as if they were not there; alone they are no row."""
    who = {"sharegpt": ("conversations", "from", "value", "human", "gpt")}.get(form)
    column, role, text, user, model = who or ("messages", "role", "content", "user", "assistant")
    whole = [{role: user, text: "one"}, {role: model, text: "two"}]
    rows = [whole + more for more in ([], [{role: user, text: "three"}], [{role: user, text: "x"}] * 2)]
    rows.append([{role: user, text: "alone"}])
    lines(tmp_path / "a.jsonl", [{column: row} for row in rows])
    config = DataConfig(dataset=str(tmp_path / "a.jsonl"), data_cache_dir=str(tmp_path / "cache"), max_bad_rows=0.5)
    renderer = make_renderer(TemplateConfig(template="chatml"), build_tokenizer())
    found = prepare(config, Sft(), renderer, cutoff_len=64, seed=0)
    (first,), *others = [found.train[i][0].paths for i in range(len(found.train))]
    assert [other.ids for (other,) in others] == [first.ids] * 2
    assert all(other.weights == first.weights for (other,) in others)
    assert found.report.total.bad_rows == 1 and "brings no answer, the stage needs 1" in found.report.total.bad


def test_a_wrong_name_of_the_answers_does_not_train_the_history(tmp_path):
    lines(tmp_path / "a.jsonl", [{"instruction": "q", "outptu": "a", "history": [["one", "two"]]}])
    config = DataConfig(dataset=str(tmp_path / "a.jsonl"), data_cache_dir=str(tmp_path / "cache"))
    renderer = make_renderer(TemplateConfig(template="chatml"), build_tokenizer())
    with pytest.raises(DataError, match="There is no column 'output'. Did you mean 'outptu'"):
        prepare(config, Sft(), renderer, cutoff_len=64, seed=0)
