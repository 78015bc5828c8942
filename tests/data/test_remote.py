"""Files in a cloud's storage, played by fsspec's own memory."""

from __future__ import annotations

import json

import fsspec
import pytest

from luthier.core.errors import DataError
from luthier.data.encode import prepare
from luthier.data.renderer import make_renderer
from luthier.data.source import DataConfig
from luthier.data.template import TemplateConfig
from luthier.objectives.sft import Sft
from tests.conftest import build_tokenizer


def trained(tmp_path, url):
    config = DataConfig(
        dataset="far",
        dataset_dir={"far": {"cloud_file_name": url}},
        data_cache_dir=str(tmp_path),
    )
    renderer = make_renderer(TemplateConfig(template="default"), build_tokenizer())
    return len(prepare(config, Sft(), renderer, cutoff_len=64, seed=0).train)


def put(url, count):
    with fsspec.open(url, "w") as file:
        file.writelines(json.dumps({"instruction": f"q {n}", "output": "hello"}) + "\n" for n in range(count))


def test_a_file_is_fetched_once_and_again_when_it_changes(tmp_path):
    url = "memory://bucket/rows.jsonl"
    put(url, 3)
    assert trained(tmp_path, url) == trained(tmp_path, url) == 3
    assert len(list((tmp_path / "fetched").glob("*.jsonl"))) == 1
    put(url, 5)
    assert trained(tmp_path, url) == 5


@pytest.mark.parametrize("url", ["memory://bucket/none.jsonl", "nosuch://bucket/rows.jsonl"])
def test_what_cannot_be_fetched_is_said(url, tmp_path):
    with pytest.raises(DataError, match=r"dataset_dir: far: .*://bucket.*could not be fetched"):
        trained(tmp_path, url)


def test_what_breaks_off_leaves_nothing_behind(tmp_path, monkeypatch):
    url = "memory://bucket/broken.jsonl"
    put(url, 3)

    def breaks_off(self, path, local):
        with open(local, "w") as file:
            file.write("half")
        raise OSError("connection reset")

    with monkeypatch.context() as patch, pytest.raises(DataError, match="connection reset"):
        patch.setattr(type(fsspec.filesystem("memory")), "get_file", breaks_off)
        trained(tmp_path, url)
    assert [file.name for file in (tmp_path / "fetched").iterdir() if file.suffix != ".lock"] == []
    assert trained(tmp_path, url) == 3
