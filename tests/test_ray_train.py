"""What Ray is asked for, what signals and errors become; Ray itself runs in e2e/test_ray.py."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from luthier import cli, ray_train, ray_worker
from luthier.commands import Command
from luthier.core.errors import ConfigError, DataError
from luthier.fit import Result
from luthier.launch import LaunchConfig

CLUSTER = {"CPU": 8.0, "GPU": 2.0, "memory": 1e9}


@pytest.mark.parametrize(
    "keys, there, cpu, each",
    [
        ({}, CLUSTER, False, {"CPU": 1, "GPU": 1}),
        ({}, CLUSTER, True, {"CPU": 1}),
        ({"resources_per_worker": {"GPU": 1}}, {"CPU": 8.0}, False, {"CPU": 1}),
        ({"resources_per_worker": {"CPU": 4, "memory": 5e8}}, CLUSTER, False, {"CPU": 4, "GPU": 1, "memory": 5e8}),
        ({"resources_per_worker": {"GPU": 0.5}}, CLUSTER, False, {"CPU": 1, "GPU": 0.5}),
    ],
)
def test_what_a_worker_takes(keys, there, cpu, each):
    assert ray_train.share(LaunchConfig(ray_num_workers=2, **keys), there, cpu=cpu) == each


def test_a_cluster_that_never_grows_is_not_waited_for(monkeypatch, caplog):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="ray_num_workers: 3 want 1 GPU each, and the cluster has 2"):
        ray_train.share(LaunchConfig(ray_num_workers=3), CLUSTER, cpu=False)
    with pytest.raises(ConfigError, match="9 want 1 CPU each, and the cluster has 8"):
        ray_train.share(LaunchConfig(ray_num_workers=9), CLUSTER, cpu=True)
    elsewhere = LaunchConfig(ray_num_workers=9, ray_init_kwargs={"address": "auto"})
    assert ray_train.share(elsewhere, CLUSTER, cpu=True) == {"CPU": 1}


def test_arguments_of_ray():
    pytest.importorskip("ray")
    found = ray_train.init_arguments(LaunchConfig(ray_init_kwargs={"address": "auto", "include_dashboard": True}))
    assert found["address"] == "auto" and found["include_dashboard"] is True
    assert ray_train.init_arguments(LaunchConfig())["include_dashboard"] is False
    assert ray_train.ENVIRONMENT["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.parametrize(
    "asked, said",
    [({"addres": "auto"}, "Unknown keyword argument"), ({"address": "nowhere://x"}, "parsed from Address")],
)
def test_what_ray_does_not_take_is_said(asked, said):
    pytest.importorskip("ray")
    with (
        pytest.raises(ConfigError, match="ray_init_kwargs") as caught,
        ray_train._cluster(LaunchConfig(ray_init_kwargs=asked)),
    ):
        pass
    assert said in str(caught.value)


def test_arguments_of_the_trainer(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    keys = {"ray_num_workers": 2, "ray_run_name": "mine", "ray_storage_path": "kept", "placement_strategy": "SPREAD"}
    run = SimpleNamespace(launch=LaunchConfig(**keys), training={"ddp_timeout": 77})
    command = Command("a b.yaml", ["seed=1"], {})
    made = ray_train._trainer(run, command, {"CPU": 3}, tmp_path / "out" / "ray", 5)
    scaling, config = made.scaling_config, made.run_config
    assert (scaling.num_workers, scaling.placement_strategy) == (2, "SPREAD")
    assert scaling.resources_per_worker["CPU"] == 3 and not scaling.use_gpu
    assert (config.name, config.storage_path) == ("mine", str(tmp_path / "kept"))
    assert config.failure_config.max_failures == 5
    assert made.backend_config.timeout_s == 77
    told = made.train_loop_config
    assert told["config"] == str(tmp_path / "a b.yaml") and told["overrides"] == ["seed=1"]
    assert told["cwd"] == str(tmp_path) and told["folder"] == str(tmp_path / "out" / "ray")


def test_restarts_are_a_number(monkeypatch, tmp_path):
    monkeypatch.setenv("MAX_RESTARTS", "often")
    monkeypatch.setattr(ray_train, "resolve", lambda *args, **options: None)
    with pytest.raises(ConfigError, match="MAX_RESTARTS=often: expected a whole number"):
        ray_train.main(Command({}, [], {}))


def test_without_ray_the_extra_is_named(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run = SimpleNamespace(announce=lambda log: None, training={"output_dir": "x"})
    monkeypatch.setattr(ray_train, "resolve", lambda *args, **options: run)
    assert cli.main(["train", "--ray", "stage=sft"]) == 2
    assert "pip install 'luthier[ray]'" in capfd.readouterr().err


# Signals


def test_a_signal_becomes_a_file_and_the_wait_goes_on(tmp_path, capfd):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def run():
        os.kill(os.getpid(), signal.SIGTERM)
        while not (tmp_path / "stop").exists() or not (tmp_path / "stop").read_text():
            time.sleep(0.01)
        return SimpleNamespace(return_value=int((tmp_path / "stop").read_text()))

    found = ray_train.attend(run, tmp_path)
    assert ray_train._outcome(found, tmp_path, 3) == 128 + signal.SIGTERM
    assert "SIGTERM: stopping after this step." in capfd.readouterr().err
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_the_second_control_c_does_not_wait(tmp_path, capfd):
    over = threading.Event()

    def run():
        os.kill(os.getpid(), signal.SIGINT)
        while not (tmp_path / "stop").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        over.wait(30)

    with pytest.raises(KeyboardInterrupt):
        ray_train.attend(run, tmp_path)
    over.set()
    assert "Press Ctrl-C again" in capfd.readouterr().err


# Errors in a worker


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """worker(error) does what a worker does whose run ends with it."""
    monkeypatch.setenv("RANK", "1")
    for name in ("LUTHIER_STARTED", "LUTHIER_STOP", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.setenv(name, "")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "out" / "ray"
    ray_worker.clear(folder)
    settings = {"config": {}, "overrides": [], "cwd": str(tmp_path), "folder": str(folder), "started": 1.0}
    monkeypatch.setattr(ray_worker, "resolve", lambda *args, **options: None)
    monkeypatch.setattr(ray_worker, "set_up", lambda: None)

    def work(outcome):
        def fit(run):
            if isinstance(outcome, Exception):
                raise outcome
            return Result(folder, {}, outcome)

        monkeypatch.setattr(ray_worker, "fit", fit)
        return ray_worker.work(settings)

    work.folder = folder
    return work


def never(folder):
    """What `attend` gives when a worker left word: a run that is not done."""
    return ray_train._outcome(Future(), folder, 3)


def test_a_worker_says_what_stopped_it(worker):
    assert worker(None) is None
    assert worker(15) == 15
    assert os.environ["LUTHIER_STOP"] == str(worker.folder / "stop") and os.environ["LUTHIER_STARTED"] == "1.0"


@pytest.mark.parametrize(
    "error, code, words",
    [
        (DataError("row 7 of x.jsonl"), 2, "error: row 7 of x.jsonl\n"),
        (OSError(28, "No space left on device", "/disk"), 2, "error: /disk: No space left on device. Free space"),
        (KeyError("lost"), 1, "rank 1:\nTraceback"),
    ],
)
def test_what_would_come_again_is_said_once_and_not_tried_again(worker, capfd, error, code, words):
    worker(error)
    attended = ray_train.attend(threading.Event().wait, worker.folder)  # a run that would never end
    assert not attended.done()
    assert never(worker.folder) == code
    assert capfd.readouterr().err.startswith(words)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: unspecified launch failure"), ConnectionResetError("gone")]
)
def test_what_a_restart_may_mend_is_left_to_ray(worker, error):
    with pytest.raises(type(error)):
        worker(error)
    assert not list((worker.folder / "refused").iterdir())


def test_who_only_missed_a_worker_that_refused_is_still(worker, monkeypatch):
    worker(DataError("row 7"))
    monkeypatch.setenv("RANK", "0")
    assert worker(RuntimeError("Connection closed by peer")) is None


def test_word_of_an_earlier_run_is_forgotten(worker):
    worker(DataError("old"))
    (worker.folder / "stop").write_text("15")
    ray_worker.clear(worker.folder)
    assert [path.name for path in worker.folder.iterdir()] == ["refused"] and not ray_worker.refusals(worker.folder)


def test_who_was_lost():
    died = Exception("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR.")
    missed = RuntimeError("[gloo] Connection closed by peer [10.0.0.1]:999")
    failed = RuntimeError("CUDA error: ECC.\n")
    end = " All start again from the last checkpoint, 1 of 3 times."
    assert ray_train.lost({1: died, 0: missed}, 1, 3).startswith("rank 1 was lost: its process ended; most often")
    assert ray_train.lost({0: missed, 2: failed}, 1, 3) == f"rank 2 was lost: RuntimeError: CUDA error: ECC.{end}"
    assert ray_train.lost({0: missed}, 1, 3).startswith("rank 0 was lost: RuntimeError: [gloo] Connection closed")
