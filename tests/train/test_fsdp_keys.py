"""fsdp_config through the gate: what nothing would obey is refused."""

from __future__ import annotations

import json

import pytest

from luthier.core.errors import ConfigError
from luthier.run import resolve

KEYS = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "fsdp": True}


@pytest.mark.parametrize(
    "config, words",
    [
        ({"version": 1}, "version 1 is not supported"),
        ({"reshard_after_foward": True}, "Did you mean reshard_after_forward?"),
        ({"fsdp_use_orig_params": True}, "use_orig_params belongs to FSDP1"),
        ("missing.json", "there is no file missing.json"),
    ],
)
def test_mistakes(config, words, tmp_path):
    with pytest.raises(ConfigError, match="fsdp_config.*") as caught:
        resolve({**KEYS, "fsdp_config": config})
    assert words in str(caught.value)


def test_a_list_is_no_config(tmp_path):
    file = tmp_path / "list.json"
    file.write_text("[1]")
    with pytest.raises(ConfigError, match="expected a mapping"):
        resolve({**KEYS, "fsdp_config": str(file)})


def test_alone_it_means_nothing():
    with pytest.raises(ConfigError, match="only with fsdp: true"):
        resolve({**KEYS, "fsdp": None, "fsdp_config": {"version": 2}})


@pytest.mark.parametrize("value", ["true", True, "full_shard auto_wrap"])
def test_ways_to_ask(value):
    run = resolve({**KEYS, "fsdp": value, "fsdp_config": {"fsdp_reshard_after_forward": False}})
    assert run.training["fsdp"] == (True if value == "true" else value)


def test_activations_are_computed_twice_by_one_of_the_two(tmp_path, monkeypatch):
    monkeypatch.setattr("luthier.train.config.has_accelerator", lambda: True)
    plain = resolve(KEYS).training
    file = tmp_path / "fsdp.json"
    file.write_text(json.dumps({"activation_checkpointing": True}))
    by_fsdp = resolve({**KEYS, "fsdp_config": str(file)}).training
    name = "activation_checkpointing" if "activation_checkpointing" in plain else "gradient_checkpointing"
    assert (plain[name], by_fsdp[name]) == (True, False)
