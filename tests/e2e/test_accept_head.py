"""The example's file runs as it is, but for the model; what it leaves can be loaded and goes on."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from luthier.cli import main
from luthier.fit import fit
from luthier.model import heads
from luthier.run import resolve
from tests.data.test_rounds import requests, write

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "llama3_1_8b_lora_sft_accept_head.yaml"


def test_the_example_runs_unchanged_but_for_the_model(model_folder, tmp_path, monkeypatch, caplog):
    data = tmp_path / "data"
    data.mkdir()
    write(data, *requests(4, 6))
    info = {"your_dataset": {"file_name": "train.jsonl", "formatting": "accept_head"}}
    (data / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(logging.getLogger("luthier"), "propagate", True)
    with caplog.at_level(logging.INFO, "luthier"):
        result = fit(resolve(EXAMPLE, [f"model_name_or_path={model_folder}", "save_steps=2", "logging_steps=1"]))
    for line in (
        "Replaced lm_head with AcceptHead",
        "Loaded 4 context entries from context.jsonl",
        "Using AcceptHead regression loss (BCEWithLogitsLoss).",
    ):
        assert line in caplog.text
    saved = tmp_path / "saves" / "accept_head"
    assert result.output_dir.resolve() == saved
    for folder in (saved, saved / "checkpoint-2"):
        assert (folder / EXAMPLE.name).read_text() == EXAMPLE.read_text()
        assert heads.facts(folder) | {"sep_id": None} == {
            "head": "accept",
            "stage": "accept_head",
            "hidden_size": 32,
            "layout": "sep",
            "sep_id": None,
            "template": "USER: {user_text}\nASSISTANT:{assistant_text}",
            "threshold": 0.5,
            "frozen": False,
        }
    adapter = load_file(saved / "adapter_model.safetensors")
    assert not [name for name in adapter if "lm_head" in name or "luthier_head" in name]
    shapes = {name: list(value.shape) for name, value in load_file(saved / "accept_head.safetensors").items()}
    assert shapes == {
        "v_head.layer_norm.weight": [32],
        "v_head.layer_norm.bias": [32],
        "v_head.fc1.weight": [8, 32],
        "v_head.fc1.bias": [8],
        "v_head.fc2.weight": [1, 8],
        "v_head.fc2.bias": [1],
    }
    assert all(torch.isfinite(value).all() for value in adapter.values())


@pytest.mark.parametrize("way", ["frozen", "whole"])
def test_requests_in_which_every_draft_token_matched_count_in_the_simulation_and_train_nothing(
    way, model_folder, tmp_path
):
    rows, contexts = requests(4, 6)
    matched = {"spd_round_verifier_ids": [31, 27, 149, 7], "mismatch_index": [], "mismatch_score": []}
    # The first request and the last bring nothing to train; of another, one round matched.
    rows = [row | (matched if n % 4 in (0, 3) or n == 5 else {}) for n, row in enumerate(rows)]
    write(tmp_path, rows, contexts)
    info = {"rounds": {"file_name": "train.jsonl", "formatting": "accept_head"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    keys = {"stage": "accept_head", "model_name_or_path": str(model_folder), "dataset_dir": str(tmp_path)}
    keys |= {"dataset": "rounds", "output_dir": str(tmp_path / "out"), "use_cpu": True, "num_train_epochs": 1}
    keys |= {"data_cache_dir": str(tmp_path / "cache"), "per_device_train_batch_size": 1, "save_strategy": "no"}
    keys |= {"per_device_eval_batch_size": 1, "do_train": True}
    if way == "frozen":
        keys |= {"accept_layout": "judge", "freeze_backbone": True, "eval_dataset": "rounds", "do_eval": True}
    config = tmp_path / "train.yaml"
    config.write_text(json.dumps(keys))
    fit(resolve(config, []))
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2, "one step for each request with something to train"
    assert main(["eval", str(config)]) == 0
    kept = [1 if row["mismatch_index"] else 3 for row in rows]
    reports = [tmp_path / "out" / "eval" / "accept_report.json"]
    reports += [tmp_path / "out" / "accept_report.json"] if way == "frozen" else []
    for report in reports:
        found = json.loads(report.read_text())["metrics"]
        assert (found["requests"], found["rounds"], found["positions"]) == (4, 24, 11)
        assert found["accepted_exact"] == pytest.approx(sum(kept) / len(kept))
        assert found["accepted_everything"] == pytest.approx(3)
