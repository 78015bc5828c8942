"""`luthier train --ray` on a Ray of two workers on this machine: one is killed, then the run is stopped."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from luthier import cli
from luthier.core import log
from luthier.fit import fit
from luthier.run import resolve
from tests.e2e.killing import differing, in_child, in_ranks, left_behind

# It is not imported here: what it says is settled by the environment at that time.
NO_RAY = importlib.util.find_spec("ray") is None
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(NO_RAY, reason="needs luthier[ray]")]

SLOW = 400
"""Seconds after which it hangs: Ray starts ten processes, four of them import torch."""

PLUGIN = """
import json, os, signal, time
from pathlib import Path
import psutil
from transformers import TrainerCallback

NOTES = Path({notes!r})
RANK = os.environ["RANK"]

class Trouble(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        family = psutil.Process({driver}).children(recursive=True)
        with (NOTES / f"began-{{RANK}}").open("a") as file:
            file.write(json.dumps([state.global_step, [[p.pid, p.create_time()] for p in family]]) + "\\n")

    def on_step_begin(self, args, state, control, **kwargs):
        if RANK == "1" and state.global_step == 3 and not (NOTES / "killed").exists():
            (NOTES / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if RANK == "1" and state.global_step == 5:
            os.kill({driver}, signal.SIGTERM)
            stop = Path(os.environ["LUTHIER_STOP"])
            while not (stop.exists() and stop.read_text()):
                time.sleep(0.05)

def wanted(run):
    return Trouble()
"""


def configuration(folder: Path, model: Path, name: str) -> dict[str, object]:
    rows = [{"instruction": f"row {n}", "input": "", "output": f"{n} " * (n % 5 + 1)} for n in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(model),
        "template": "chatml",
        "dataset": "rows.jsonl",
        "dataset_dir": ".",
        "finetuning_type": "lora",
        "lora_dropout": 0.1,
        "output_dir": name,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
    }


def straight(keys: dict[str, object]) -> list[int]:
    """The same as two processes that torchrun would start."""

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        log.set_up()
        fit(resolve(keys))

    return in_ranks(work)


def on_ray(folder: Path, keys: dict[str, object]) -> tuple[int, str]:
    """`luthier train --ray` in a child: exit code and stderr."""
    said = folder / "stderr.txt"

    def work() -> None:
        signal.alarm(SLOW)
        os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
        sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", buffering=0, closefd=False), write_through=True)
        plugin = folder / "mine" / "callbacks" / "trouble.py"
        plugin.parent.mkdir(parents=True)
        plugin.write_text(PLUGIN.format(notes=str(folder), driver=os.getpid()))
        (folder / "run.yaml").write_text(yaml.safe_dump(keys | {"plugins": "mine"}))
        raise SystemExit(cli.main(["train", "--ray", "run.yaml"]))

    return in_child(work), said.read_text()


def alive(pid: int, born: float) -> bool:
    """Whether a process still runs; what only waits for an init that collects the dead does not."""
    try:
        process = psutil.Process(pid)
        return process.create_time() == born and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _no_ray_here(keys) -> str:
    """What plain Ray says where it does not start at all, without Luthier."""
    program = f"import ray; ray.init(include_dashboard=False, **{keys!r}); ray.shutdown()"
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "not within two minutes"
    return done.stderr[-300:] if done.returncode else ""


def test_a_worker_is_killed_and_the_run_is_stopped_and_it_ends_where_a_straight_run_ends(
    tmp_path, model_folder, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # every path in the configuration is relative
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Workers find what this process finds, the tests' own package too.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    assert straight(configuration(tmp_path, model_folder, "straight")) == [0, 0]
    keys = configuration(tmp_path, model_folder, "through ray")
    # Two workers wherever the test runs, in little shared memory, beside any Ray that is there already.
    ray = {
        "ray_num_workers": 2,
        "ray_init_kwargs": {"address": "local", "num_cpus": 2, "object_store_memory": 80 << 20},
    }
    code, said = on_ray(tmp_path, keys | ray)
    # One of Ray's own helpers stumbles over any other Ray that runs here or was killed here.
    said = re.sub(r"Exception in thread PlacementGroupCleanerMonitor:\n(?:Traceback.*\n| .*\n)*\S.*\n", "", said)
    if code != 128 + signal.SIGTERM and (why := _no_ray_here(ray["ray_init_kwargs"])):
        pytest.skip(f"Ray itself does not start on this machine: {why}")
    assert code == 128 + signal.SIGTERM, said
    assert said.count("was lost") == 1 and "rank 1 was lost: its process ended" in said and "1 of 3 times" in said, said
    assert said.count("step 4/8") == 1 and "error:" not in said, said
    assert "Traceback" not in said.partition("rank 1 was lost")[2], said
    assert "SIGTERM: saving checkpoint-6 and stopping" in said, said
    began = [json.loads(line) for line in (tmp_path / "began-0").read_text().splitlines()]
    assert [step for step, _ in began] == [0, 2], "a new start goes on from the last checkpoint"
    family = {(pid, born) for _, those in began for pid, born in those}
    assert len(family) > 5
    assert [pid for pid, born in family if alive(pid, born)] == []
    # What Ray began the engines of others can end.
    assert straight(keys) == [0, 0]
    assert differing(left_behind(tmp_path / "straight"), left_behind(tmp_path / "through ray")) == []
