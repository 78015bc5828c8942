"""Ten steps through the command line are ten steps, also when the process is killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from luthier.fit import fit
from luthier.run import resolve

pytestmark = pytest.mark.e2e

PLUGIN = """
import time
from transformers import TrainerCallback

class Slow(TrainerCallback):
    # Leaves the test time to kill the run between two steps.
    def on_step_end(self, args, state, control, **kwargs):
        time.sleep({pause})

def wanted(run):
    return Slow()
"""


def _config(folder: Path, model: Path, name: str, pause: float) -> Path:
    rows = [{"instruction": f"Say {n}", "input": "", "output": f"{n} " * (n % 5 + 1)} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plugins = folder / f"plugins-{name}" / "callbacks"
    plugins.mkdir(parents=True)
    (plugins / "slow.py").write_text(PLUGIN.format(pause=pause))
    file = folder / f"{name}.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "model_name_or_path": str(model),
                "stage": "sft",
                "do_train": True,
                "finetuning_type": "lora",
                "lora_dropout": 0.1,
                "template": "chatml",
                "dataset": str(folder / "rows.jsonl"),
                "data_cache_dir": str(folder / "cache"),
                "cutoff_len": 64,
                "output_dir": str(folder / name),
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "learning_rate": 1e-3,
                "lr_scheduler_type": "cosine",
                "num_train_epochs": 1,
                "logging_steps": 1,
                "save_steps": 1,
                "val_size": 4,
                "eval_strategy": "steps",
                "eval_steps": 4,
                "max_steps": 10,
                "plugins": str(plugins.parent),
            }
        )
    )
    return file


def _command(config: Path) -> list[str]:
    return [sys.executable, "-m", "luthier", "train", str(config)]


def _log(folder: Path) -> list[dict]:
    moving = ("elapsed_time", "remaining_time", "throughput", "eval_runtime", "eval_samples_per_second")
    moving = (*moving, "eval_steps_per_second")
    lines = (folder / "trainer_log.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in moving} for line in lines]


def test_kill_9_and_the_same_command_again(tmp_path, model_folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    fit(resolve(_config(tmp_path, model_folder, "straight", pause=0)))

    killed = _config(tmp_path, model_folder, "killed", pause=0.4)
    process = subprocess.Popen(_command(killed), env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoint-5").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (tmp_path / "killed" / ".partial-checkpoint-9").mkdir()  # as if it had died while writing
    done = subprocess.run(_command(killed), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Resuming from" in done.stderr
    assert not list((tmp_path / "killed").glob(".partial-*"))

    for name in ("adapter_model.safetensors", "checkpoint-10/adapter_model.safetensors"):
        once, twice = (load_file(tmp_path / run / name) for run in ("straight", "killed"))
        assert once.keys() == twice.keys()
        assert all(once[key].equal(twice[key]) for key in once), name
    assert _log(tmp_path / "straight") == _log(tmp_path / "killed")
    for folder in ("killed", "killed/checkpoint-10"):
        assert (tmp_path / folder / "killed.yaml").read_text() == killed.read_text()
        assert (tmp_path / folder / "resolved_config.yaml").is_file()


def test_a_pissa_run_that_goes_on_writes_what_it_would_have_written(tmp_path, model_folder):
    """The folder of the adapter's start inside a checkpoint is no second adapter."""
    config = yaml.safe_load(_config(tmp_path, model_folder, "straight", pause=0).read_text())
    config |= {"pissa_init": True, "pure_bf16": True, "max_steps": 2, "eval_strategy": "no", "plugins": None}
    fit(resolve(config))
    (tmp_path / "broken").mkdir()
    (tmp_path / "straight" / "checkpoint-1").rename(tmp_path / "broken" / "checkpoint-1")
    fit(resolve(config | {"output_dir": str(tmp_path / "broken")}))
    once, again = (tmp_path / name / "checkpoint-2" for name in ("straight", "broken"))
    names = ["adapter_model.safetensors", "pissa_init/adapter_model.safetensors", "pissa_init/adapter_config.json"]
    for name in ["adapter_config.json", *names]:
        assert (once / name).read_bytes() == (again / name).read_bytes(), name
