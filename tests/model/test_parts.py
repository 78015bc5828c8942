"""Weights in FSDP's parts: joined as they were saved, and nothing else is read from them."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

from luthier.core.errors import ModelError
from luthier.model import parts
from luthier.model.adapt import AdapterConfig, adapter_folders
from luthier.model.load import load_model
from luthier.model.source import ModelConfig
from tests.conftest import build_model


def save(state: dict[str, torch.Tensor], folder) -> None:
    """As accelerate does."""
    dcp.save({"model": state}, storage_writer=dcp.FileSystemWriter(folder / parts.FOLDER), no_dist=True)


@pytest.fixture
def model_in_parts(model_folder, tmp_path):
    """The tiny model as a checkpoint in parts: its settings and texts beside them."""
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    for file in model_folder.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    save(load_file(model_folder / "model.safetensors"), folder)
    return folder


def test_a_whole_model_comes_out_bit_for_bit(model_in_parts, model_folder, tmp_path):
    assert parts.in_parts(model_in_parts) and not parts.in_parts(model_folder)
    beside = tmp_path / "export"
    with parts.joined(ModelConfig(model_name_or_path=str(model_in_parts)), AdapterConfig(), beside) as (model, _):
        found = load_model(model).state_dict()
        made = model.model_name_or_path
    wanted = load_model(ModelConfig(model_name_or_path=str(model_folder))).state_dict()
    assert found.keys() == wanted.keys() and all(found[name].equal(wanted[name]) for name in wanted)
    assert not os.path.exists(made), "the whole weights were for the export alone"


def test_what_is_whole_is_left_alone(model_folder, tmp_path):
    model, adapter = ModelConfig(model_name_or_path=str(model_folder)), AdapterConfig(adapter_name_or_path="a, b")
    with parts.joined(model, adapter, tmp_path / "x") as (same, both):
        assert same == model and both.adapter_name_or_path == ["a", "b"]


def test_an_adapter_and_a_head(tmp_path):
    folder, target = tmp_path / "checkpoint-1", tmp_path / "whole"
    folder.mkdir()
    target.mkdir()
    weights = {
        "base_model.model.a.lora_A.weight": torch.randn(3, 4),
        "base_model.luthier_head.weight": torch.ones(1, 4),
    }
    save(weights, folder)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "value_head.json").write_text(json.dumps({"head": "value", "stage": "rm"}))
    parts.join(folder, target)
    assert load_file(target / "adapter_model.safetensors").keys() == {"base_model.model.a.lora_A.weight"}
    assert load_file(target / "value_head.safetensors")["v_head.weight"].equal(torch.ones(1, 4))
    assert json.loads((target / "value_head.json").read_text())["stage"] == "rm"


class Trap:
    """What an attacker would put into a pickle."""

    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_a_table_of_contents_runs_nothing(model_in_parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (model_in_parts / parts.FOLDER / ".metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ModelError, match=r"asks for \w+.mkdir, which no checkpoint needs"):
        parts.read(model_in_parts / parts.FOLDER)
    assert not (tmp_path / "trapped").exists()


def test_a_damaged_part_is_named(model_in_parts):
    file = next((model_in_parts / parts.FOLDER).glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match=f"{parts.FOLDER} cannot be joined"):
        parts.read(model_in_parts / parts.FOLDER)


def test_other_commands_say_what_to_do(model_in_parts, tmp_path):
    config = ModelConfig(model_name_or_path=str(model_in_parts))
    with pytest.raises(ModelError, match="FSDP's parts, which `luthier export` joins"):
        load_model(config)
    deepspeed = tmp_path / "checkpoint-7"
    (deepspeed / "global_step7").mkdir(parents=True)
    (deepspeed / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="zero_to_fp32.py"):
        adapter_folders(AdapterConfig(adapter_name_or_path=str(deepspeed)), config)
    # A head beside them is no model.
    (deepspeed / "adapter_config.json").rename(deepspeed / "config.json")
    (deepspeed / "config.json").write_text((model_in_parts / "config.json").read_text())
    (deepspeed / "value_head.safetensors").touch()
    with pytest.raises(ModelError, match=r"has no weights.*zero_to_fp32.py \. \. --safe"):
        load_model(ModelConfig(model_name_or_path=str(deepspeed)))


def test_tied_weights_are_saved_once_or_twice_but_found(tmp_path):
    model = build_model("llama", tie_word_embeddings=True)
    folder, target = tmp_path / "checkpoint-2", tmp_path / "whole"
    folder.mkdir()
    target.mkdir()
    save(model.state_dict(), folder)
    model.config.save_pretrained(folder)
    parts.join(folder, target)
    again = load_model(ModelConfig(model_name_or_path=str(target)))
    assert again.lm_head.weight.equal(model.lm_head.weight)
