"""Hubs beside Hugging Face's, played by a module with the signature of the real `snapshot_download`."""

from __future__ import annotations

import json
import sys
import threading
import time
import types

import pytest

from luthier.core import hubs
from luthier.core.errors import ConfigError, DataError, LuthierError
from luthier.data.encode import prepare
from luthier.data.info import sources
from luthier.data.renderer import make_renderer
from luthier.data.source import DataConfig
from luthier.data.template import TemplateConfig
from luthier.model.source import ModelConfig, read_settings
from luthier.model.tokenizer import load_tokenizer
from luthier.objectives.sft import Sft
from tests.conftest import build_model, build_tokenizer


class Played:
    """What modelscope does: folders by (kind, id), an error for what it cannot reach."""

    def __init__(self):
        self.there, self.kept, self.asked = {}, {}, []
        self.slow = 0.0

    def snapshot_download(
        self, model_id=None, revision=None, cache_dir=None, local_files_only=False, *, repo_id=None, repo_type=None,
        token=None,
    ):  # fmt: skip
        self.asked.append(
            {"repo_id": repo_id, "repo_type": repo_type, "revision": revision, "cache_dir": cache_dir, "token": token,
             "local_files_only": local_files_only}
        )  # fmt: skip
        time.sleep(self.slow)
        found = (self.kept if local_files_only else self.there).get((repo_type, repo_id))
        if found is None:
            raise OSError("[E1020] Connection failed:\nmuch more")
        return str(found)


@pytest.fixture
def played(monkeypatch, tmp_path):
    played = Played()
    module = types.ModuleType("modelscope")
    module.snapshot_download = played.snapshot_download
    monkeypatch.setitem(sys.modules, "modelscope", module)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("USE_OPENMIND_HUB", raising=False)
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    hubs._fetched.cache_clear()
    yield played
    hubs._fetched.cache_clear()


def test_a_model_and_its_tokenizer_come_from_modelscope(played, tmp_path):
    build_model("llama").save_pretrained(tmp_path / "m")
    build_tokenizer().save_pretrained(tmp_path / "m")
    played.there["model", "org/thing"] = tmp_path / "m"
    config = ModelConfig(model_name_or_path="org/thing", ms_hub_token="ms_mine", cache_dir="kept", model_revision="v3")
    assert read_settings(config).num_hidden_layers == 2
    assert load_tokenizer(config).eos_token == "<|im_end|>"
    assert played.asked == [
        {"repo_id": "org/thing", "repo_type": "model", "revision": "v3", "cache_dir": "kept", "token": "ms_mine",
         "local_files_only": False}
    ]  # fmt: skip
    played.there["model", "org/other"] = tmp_path / "m"
    read_settings(ModelConfig(model_name_or_path="org/other"))
    assert played.asked[-1]["revision"] == "master", "the branch that Hugging Face calls main"


def test_a_local_folder_is_asked_of_no_hub(played, tmp_path):
    build_model("llama").save_pretrained(tmp_path / "m")
    read_settings(ModelConfig(model_name_or_path=str(tmp_path / "m")))
    assert played.asked == []


def rows(folder, **more):
    folder.mkdir()
    (folder / "train.jsonl").write_text(
        "".join(json.dumps({"instruction": f"q {n}", "output": "hello"}) + "\n" for n in range(4))
    )
    return folder


def prepared(info, name, tmp_path, **keys):
    config = DataConfig(dataset=name, dataset_dir=info, data_cache_dir=str(tmp_path / "encoded"), **keys)
    renderer = make_renderer(TemplateConfig(template="default"), build_tokenizer())
    return prepare(config, Sft(), renderer, cutoff_len=64, seed=0, access=hubs.Access(tokens={"modelscope": "ms_mine"}))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_comes_from_modelscope(played, tmp_path, monkeypatch, streaming):
    monkeypatch.delenv("USE_MODELSCOPE_HUB")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    played.there["dataset", "org/set"] = rows(tmp_path / "set")
    found = prepared({"mine": {"ms_hub_url": "org/set"}}, "mine", tmp_path, streaming=streaming, buffer_size=10)
    assert (found.stream.epoch if streaming else len(found.train)) == 4
    assert [(asked["repo_type"], asked["revision"], asked["token"]) for asked in played.asked] == [
        ("dataset", "master", "ms_mine")
    ]


@pytest.mark.parametrize(
    ("switch", "entry", "expected"),
    [
        ("", {"hf_hub_url": "h/s", "ms_hub_url": "m/s"}, ("hf", "h/s")),
        ("", {"ms_hub_url": "m/s", "om_hub_url": "o/s"}, ("modelscope", "m/s")),
        ("USE_MODELSCOPE_HUB", {"hf_hub_url": "h/s", "ms_hub_url": "m/s", "om_hub_url": "o/s"}, ("modelscope", "m/s")),
        ("USE_MODELSCOPE_HUB", {"hf_hub_url": "h/s"}, ("hf", "h/s")),
        ("USE_OPENMIND_HUB", {"hf_hub_url": "h/s", "ms_hub_url": "m/s", "om_hub_url": "o/s"}, ("openmind", "o/s")),
    ],
)
def test_which_hub_an_entry_means(monkeypatch, switch, entry, expected):
    for name in ("USE_MODELSCOPE_HUB", "USE_OPENMIND_HUB"):
        monkeypatch.setenv(name, "1" if name == switch else "0")
    (source,) = sources("it", {"it": entry | {"revision": "v1"}})
    assert (source.store, source.hub, source.revision) == (*expected, "v1")


def test_online_names_are_ids_of_the_chosen_hub(monkeypatch):
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "true")
    assert [s.store for s in sources("org/a,org/b", "ONLINE")] == ["modelscope", "modelscope"]
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "0")
    assert sources("org/a", "ONLINE")[0].store == "hf"


def test_a_subset_that_is_no_text_is_said():
    with pytest.raises(ConfigError, match="it: subset: 3 .int. must be text"):
        sources("it", {"it": {"hf_hub_url": "a/b", "subset": 3}})
    with pytest.raises(ConfigError, match="ms_hub_url: .* must be text, such as org/name"):
        sources("it", {"it": {"ms_hub_url": ["a/b"]}})


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    hubs._fetched.cache_clear()
    with pytest.raises(ConfigError, match="dataset: 'a/b' lies on ModelScope.*`pip install modelscope`, or download"):
        hubs.snapshot("modelscope", "a/b", kind="dataset", place="dataset", access=hubs.OPEN)


def test_what_cannot_be_reached_is_taken_from_before_or_refused(played, tmp_path, caplog):
    with pytest.raises(LuthierError) as caught:
        read_settings(ModelConfig(model_name_or_path="org/gone"))
    said = str(caught.value)
    assert said.startswith("model_name_or_path: 'org/gone' could not be fetched from ModelScope ([E1020] Connection")
    assert "no copy of it here" in said and "USE_MODELSCOPE_HUB" in said and "much more" not in said
    played.kept["model", "org/kept"] = tmp_path
    where = hubs.snapshot("modelscope", "org/kept", kind="model", place="x", access=hubs.OPEN)
    assert where == tmp_path and "using what was fetched before" in caplog.text


def test_offline_asks_for_nothing(played, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    played.there["model", "org/thing"] = played.kept["model", "org/kept"] = tmp_path
    assert hubs.snapshot("modelscope", "org/kept", kind="model", place="x", access=hubs.OPEN) == tmp_path
    with pytest.raises(LuthierError, match="x: 'org/thing' is wanted offline, and there is no copy of it here"):
        hubs.snapshot("modelscope", "org/thing", kind="model", place="x", access=hubs.OPEN)
    assert all(asked["local_files_only"] for asked in played.asked)


def test_two_that_want_the_same_fetch_one_after_the_other_and_say_so(played, tmp_path, caplog):
    caplog.set_level("INFO", logger="luthier")
    played.there["model", "org/thing"], played.slow = tmp_path, 0.3

    def fetch(place):
        hubs.snapshot("modelscope", "org/thing", kind="model", place=place, access=hubs.OPEN)

    ask = [threading.Thread(target=fetch, args=(place,)) for place in "ab"]
    for thread in ask:
        thread.start()
    for thread in ask:
        thread.join(30)
    assert "Another process is fetching modelscope model org/thing; waiting for it." in caplog.text


def test_a_broken_data_set_of_a_hub_is_one_message(played, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "empty").mkdir()
    played.there["dataset", "org/set"] = tmp_path / "empty"
    with pytest.raises(DataError, match="mine: 'org/set' .*loading it from the hub failed"):
        prepared({"mine": {"ms_hub_url": "org/set"}}, "mine", tmp_path)
