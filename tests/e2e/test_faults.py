"""Killed anywhere and started again with the same command, a run ends bitwise where it would have ended."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest

from tests.e2e.killing import differing, left_behind, straight, train

pytestmark = pytest.mark.e2e

KILLS = 20


def configuration(folder: Path, model: Path, name: str, **changes) -> dict[str, object]:
    """A run in which everything that has a state has one: packing, interleaving, dropout, accumulation, epochs."""
    for file, count in (("few.jsonl", 10), ("more.jsonl", 16)):
        rows = [{"instruction": f"{file} {n}", "input": "", "output": f"{n} " * (n % 5 + 1)} for n in range(count)]
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(model),
        "stage": "sft",
        "template": "chatml",
        "dataset": f"{folder / 'few.jsonl'},{folder / 'more.jsonl'}",
        "mix_strategy": "interleave_once",
        "data_cache_dir": str(folder / "cache"),
        "cutoff_len": 96,
        "packing": True,
        "val_size": 3,
        "finetuning_type": "lora",
        "lora_dropout": 0.1,
        "output_dir": str(folder / name),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 2,
        "logging_steps": 2,
        "save_steps": 2,
        "save_total_limit": 2,
        "eval_strategy": "epoch",
        "metric_for_best_model": "loss",
        **changes,
    }


def test_killed_at_random_points_it_ends_bitwise_the_same(tmp_path, model_folder):
    events = straight(configuration(tmp_path, model_folder, "straight"))
    expected = left_behind(tmp_path / "straight")
    assert len(expected["log"]) > 5, "there is something to compare"
    rng, kills, runs = random.Random(7), 0, 0
    while kills < KILLS:
        runs += 1
        name = f"run-{runs}"
        keys = configuration(tmp_path, model_folder, name)
        while (code := train(keys, die_at=rng.randint(1, events) if kills < KILLS else -1)) == -signal.SIGKILL:
            kills += 1
        assert code == 0
        assert differing(expected, left_behind(tmp_path / name)) == [], f"{name} after {kills} kills"
    assert runs > 1
