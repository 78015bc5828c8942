"""Streamed training through the command's own way: the same for any number of workers, and bitwise after a break."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from luthier.core.errors import ConfigError
from luthier.fit import fit
from luthier.run import resolve


@pytest.fixture
def keys(model_folder, tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"number {n}", "output": "hello world " * (1 + n % 6)} for n in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return {
        "model_name_or_path": str(model_folder),
        "dataset": str(file),
        "template": "default",
        "finetuning_type": "full",
        "streaming": True,
        "packing": True,
        "cutoff_len": 64,
        "preprocessing_batch_size": 8,
        "buffer_size": 20,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "save_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
    }


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_a_broken_run_goes_on_bitwise_with_any_number_of_workers(keys, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    fit(resolve(keys | {"output_dir": str(straight)}))
    # The scheduler must know of all six steps, so the break is a checkpoint taken over from the whole run.
    broken.mkdir()
    (straight / "checkpoint-2").rename(broken / "checkpoint-2")
    fit(resolve(keys | {"output_dir": str(broken), "dataloader_num_workers": 1}))
    a, b = weights(straight), weights(broken)
    assert all(torch.equal(a[name], b[name]) for name in a)
    first = json.loads((broken / "checkpoint-2" / "loop_state_0.json").read_text())
    assert first["stream"][0] > 0, "the third step begins in a later chunk"


def test_data_seed_is_the_seed_of_the_order(keys, tmp_path):
    def loss(**more):
        fit(resolve(keys | {"max_steps": 1, "output_dir": str(tmp_path / repr(more)), "save_strategy": "no"} | more))
        return json.loads((tmp_path / repr(more) / "trainer_log.jsonl").read_text())["loss"]

    usual = loss()
    assert loss(data_seed=42) == usual != loss(data_seed=9), "seed is 42 where nobody says otherwise"


def test_without_max_steps_it_would_never_end(keys, tmp_path):
    with pytest.raises(ConfigError, match="max_steps must say when training does"):
        resolve(keys | {"output_dir": str(tmp_path / "x"), "max_steps": -1})
