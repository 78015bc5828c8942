"""What the user may write under `dataset`, and what he is told when it does not fit."""

from __future__ import annotations

import json

import pytest

from luthier.core.errors import ConfigError, DataError
from luthier.data.info import guess, sources
from luthier.data.source import Columns, DataConfig


@pytest.fixture
def folder(tmp_path):
    """A data folder with a dataset_info.json; each entry's file exists."""
    info = {
        "plain": {"file_name": "plain.json"},
        "chats": {
            "file_name": "chats.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "talk"},
            "tags": {"user_tag": "me"},
        },
        "pairs": {"file_name": "plain.json", "ranking": True, "num_samples": 5, "split": "test", "folder": "sub"},
        "some": {"file_name": "plain.json", "columns": {"prompt": "question"}},
        "hub": {"hf_hub_url": "org/set", "ms_hub_url": "org/other", "subset": "en"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "plain.json").write_text("[]")
    (tmp_path / "chats.jsonl").write_text("")
    return tmp_path


def test_names_of_dataset_info(folder):
    plain, chats = sources("plain, chats", str(folder))
    assert plain.path == folder / "plain.json"
    assert (plain.name, plain.format, plain.split, plain.weight) == ("plain", "alpaca", "train", None)
    assert plain.columns.names == {
        "prompt": "instruction", "query": "input", "response": "output", "history": None, "messages": "conversations",
        "system": None, "tools": None, "chosen": None, "rejected": None, "kto_tag": None,
        "score": "score", "images": None, "videos": None, "audios": None,
    }  # fmt: skip
    assert chats.format == "sharegpt"
    assert chats.columns.name("messages") == "talk"
    assert chats.columns.tags["user_tag"] == "me"
    assert chats.columns.tags["assistant_tag"] == "gpt"


def test_naming_columns_says_that_the_others_do_not_exist(folder):
    (source,) = sources("some", str(folder))
    assert source.columns.name("prompt") == "question"
    assert [source.columns.name(m) for m in ("query", "response", "history", "system")] == [None] * 4
    assert source.columns.given == {"prompt"}


def test_all_keys_of_an_entry(folder):
    (source,) = sources(["pairs"], str(folder))
    assert (source.num_samples, source.split, source.folder) == (5, "test", "sub")
    assert source.columns.ranking
    assert (source.columns.name("chosen"), source.columns.name("rejected")) == ("chosen", "rejected")
    (hub,) = sources("hub", str(folder))
    assert (hub.hub, hub.subset, hub.path) == ("org/set", "en", None)


def test_paths_and_mappings(folder):
    file = str(folder / "chats.jsonl")
    (by_path,) = sources(file, "nowhere")
    assert (by_path.path, by_path.format, by_path.columns) == (folder / "chats.jsonl", None, None)
    (below,) = sources("chats.jsonl", str(folder))
    assert below.path == folder / "chats.jsonl"
    entry = {
        "path": file,
        "format": "sharegpt",
        "weight": 2,
        "num_samples": 3,
        "columns": {"messages": "m"},
        "name": "n",
    }
    inline, name = sources([entry, "plain"], str(folder))
    assert (inline.format, inline.weight, inline.num_samples, inline.name) == ("sharegpt", 2.0, 3, "n")
    assert inline.columns.name("messages") == "m"
    assert name.name == "plain"
    (known,) = sources([{"path": "chats", "weight": 0.5}], str(folder))
    assert (known.format, known.weight, known.columns.name("messages")) == ("sharegpt", 0.5, "talk")


def test_dataset_dir_from_python_and_online(folder):
    (source,) = sources("x", {"x": {"file_name": str(folder / "plain.json")}})
    assert source.path == folder / "plain.json"
    (online,) = sources("anything", "ONLINE")
    assert online.hub == "anything"
    (hub,) = sources("org/name", str(folder))
    assert hub.hub == "org/name"


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("plane", ["no data set", "'plane'", "Did you mean 'plain'", "chats, hub, pairs"]),
        ("plan.json", ["no such file or folder: 'plan.json'", "plain.json'"]),
        ([{"path": "plain", "colums": {}}], ["'colums'", "Did you mean 'columns'"]),
        ([{"path": "plain", "columns": {"promt": "x"}}], ["'promt'", "Did you mean 'prompt'"]),
        ([{"path": "plain", "tags": {"role": "x"}}], ["'role'", "Did you mean 'role_tag'"]),
        ([{"path": "plain", "format": "alpacca"}], ["format", "'alpacca'", "Did you mean 'alpaca'", "sharegpt"]),
        ([{"path": "plain", "weight": 0}], ["dataset[0]", "weight", "above 0"]),
        ([{"path": "plain", "num_samples": 0}], ["num_samples"]),
        ([{"path": "plain", "ranking": "yes"}], ["ranking", "true or false"]),
        ([{"format": "alpaca"}], ["path is missing"]),
        ("", ["dataset: is empty"]),
    ],
)
def test_what_is_wrong_is_named(folder, dataset, expected):
    with pytest.raises((ConfigError, DataError)) as caught:
        sources(dataset, str(folder))
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"file_nam": "x"}, ["'file_nam'", "Did you mean 'file_name'"]),
        ({"file_name": "gone.json"}, ["no such file", "gone.json"]),
        ({"script_url": "x"}, ["script_url", "runs code"]),
        ({"formatting": "alpaca"}, ["nothing to read"]),
        ({"file_name": ["a.json", "b.json"]}, ["file_name", "must be text"]),
        ({"file_name": "x", "columns": {"prompt": ["question"]}}, ["columns: prompt", "['question']", "must be text"]),
        ({"file_name": "x", "tags": {"user_tag": ["human"]}}, ["tags: user_tag", "must be text"]),
        ("text", ["expected a mapping"]),
    ],
)
def test_a_wrong_entry_of_dataset_info(tmp_path, entry, expected):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"it": entry}))
    with pytest.raises((ConfigError, DataError)) as caught:
        sources("it", str(tmp_path))
    for part in [*expected, "it"]:
        assert part in str(caught.value)


def test_a_broken_dataset_info(tmp_path):
    (tmp_path / "dataset_info.json").write_text('{\n "a": {"file_name" "x"}\n}')
    with pytest.raises(DataError, match=r"dataset_info\.json, line 2, column 20"):
        sources("a", str(tmp_path))


def test_no_dataset_info_at_all(tmp_path):
    with pytest.raises(DataError, match="'a' is no file, and .*dataset_info.json does not exist"):
        sources("a", str(tmp_path))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "", "output": ""}, "alpaca"),
        ({"conversations": [{"from": "human", "value": ""}]}, "sharegpt"),
        ({"conversations": [{"role": "user", "content": ""}]}, "openai"),
        ({"messages": [{"role": "user", "content": ""}]}, "openai"),
        ({"text": ""}, "text"),
        ({"instruction": "", "output": [], "score": []}, "ranked"),
        ({"instruction": "", "output": "", "score": 1.0}, "alpaca"),
    ],
)
def test_the_format_is_told_from_the_first_row(tmp_path, row, expected):
    file = tmp_path / "a.jsonl"
    file.write_text("")
    (source,) = sources(str(file), "data")
    assert guess(row, source, file).format == expected


def test_a_file_named_directly_brings_its_system_and_history(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("")
    (source,) = sources(str(file), "data")
    columns = guess({"instruction": ""}, source, file).columns
    assert [columns.name(m) for m in ("system", "history", "tools")] == ["system", "history", "tools"]


def test_a_format_that_cannot_be_told(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("")
    (source,) = sources(str(file), "data")
    with pytest.raises(DataError, match="question, answer.*one of: .*alpaca"):
        guess({"question": "", "answer": ""}, source, file)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"mix_strategy": "interleave"}, "mix_strategy"),
        ({"max_samples": 0}, "max_samples"),
        ({"val_size": -1}, "val_size"),
        ({"val_size": 2.5, "dataset": "a"}, "val_size"),
        ({"val_size": 2, "dataset": "a", "eval_dataset": "b"}, "eval_dataset"),
        ({"val_size": 2}, "dataset"),
        ({"max_bad_rows": 1.5}, "max_bad_rows"),
        ({"preprocessing_batch_size": 0}, "preprocessing_batch_size"),
        ({"preprocessing_num_workers": 0}, "preprocessing_num_workers"),
        ({"interleave_probs": "0.5,0.5"}, "interleave_probs"),
        ({"interleave_probs": "a,b", "mix_strategy": "interleave_under"}, "interleave_probs"),
        ({"interleave_probs": [0.5, 0.4], "mix_strategy": "interleave_under"}, "add up to 1"),
    ],
)
def test_keys_that_cannot_be(keys, expected):
    with pytest.raises(ConfigError, match=expected):
        DataConfig(**keys)


def test_probabilities():
    assert DataConfig(interleave_probs="0.25, 0.75", mix_strategy="interleave_over").probabilities() == [0.25, 0.75]
    assert DataConfig().probabilities() is None


def test_columns_defaults_are_not_shared():
    first = Columns()
    first.names["prompt"] = "changed"
    assert Columns().name("prompt") == "instruction"
