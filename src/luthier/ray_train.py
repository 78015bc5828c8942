"""`luthier train --ray`: the same run in the processes of a Ray cluster, started again when one of them is lost.

Ray Train starts the workers, tells each its rank and connects them; a worker then does what `luthier train` does. The
checkpoints of `output_dir` are what a restarted run goes on from, so every node must see that folder under one name.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError, LuthierError, TrainingError
from luthier.core.log import get_logger, set_up
from luthier.fit import fit
from luthier.run import Run, resolve
from luthier.train.resume import STARTED

if TYPE_CHECKING:
    from luthier.cli import Command

log = get_logger("ray")

FOLDER = "ray"
"""In output_dir: Ray's own files, and what a worker says that no restart can mend."""
REFUSED = "refused"
PATIENCE = 5.0
"""Seconds a worker waits to see whether the others fail as it did."""
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray would report to its makers
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
}
RESTARTS = 3
"""How often a run is started again; MAX_RESTARTS says otherwise."""


def main(command: Command) -> int:
    """Train as `command` says; returns the exit code."""
    run = resolve(command.config, command.overrides, verb="train")
    for line in (*run.warnings, *run.notes):
        log.info("%s", line)
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("--ray needs Ray, which is not installed: pip install luthier[ray]")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    # What Ray's own processes say between our lines is left out unless it is an error.
    quiet = {"logging_level": logging.ERROR, "logging_config": ray.LoggingConfig(log_level="ERROR")}
    ray.init(**{**quiet, **(run.launch.ray_init_kwargs or {})})
    try:
        return _train(run, command)
    finally:
        ray.shutdown()


def _train(run: Run, command: Command) -> int:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    workers = run.launch.ray_num_workers
    gpu = _has_room(workers, cpu=bool(run.training.get("use_cpu")))
    folder = Path(run.training["output_dir"]).expanduser().absolute() / FOLDER
    shutil.rmtree(folder / REFUSED, ignore_errors=True)
    restarts = int(os.environ.get("MAX_RESTARTS", RESTARTS))
    log.info("Starting %d workers on Ray; if one is lost, all start again, %d times at most.", workers, restarts)
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "config": _whole(command.config),
            "overrides": command.overrides,
            "cwd": os.getcwd(),
            "folder": str(folder),
            "started": time.time(),
        },
        torch_config=TorchConfig(timeout_s=int(run.training.get("ddp_timeout", 1800))),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu),
        run_config=RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=restarts),
        ),
    )
    failed = None
    try:
        trainer.fit()
    except TrainingFailedError as error:
        failed = error
    if said := _refusals(folder):
        raise TrainingError(said[0].read_text(encoding="utf-8"))
    if failed is not None:
        raise TrainingError(f"The run failed {restarts + 1} times on Ray; the last time: {_reason(failed)}") from failed
    return 0


def _work(settings: Mapping[str, Any]) -> None:
    """What each worker does. Ray has put its rank into the environment."""
    folder = Path(settings["folder"])
    if _refusals(folder):
        return  # An earlier attempt found what no restart can mend; the driver says it.
    if Path(settings["cwd"]).is_dir():
        os.chdir(settings["cwd"])
    # A checkpoint that is younger than the run was written by an attempt before this one.
    os.environ |= {STARTED: str(settings["started"]), "TORCHELASTIC_RESTART_COUNT": "1"}
    set_up()
    try:
        fit(resolve(settings["config"], settings["overrides"], verb="train"))
    except LuthierError as error:
        _refuse(folder, str(error))
    except Exception:
        if not _refusals(folder):
            raise


def _refuse(folder: Path, text: str) -> None:
    """Leave word for the driver. Where the other workers did not fail as well, they wait for this one: it dies."""
    (folder / REFUSED).mkdir(parents=True, exist_ok=True)
    (folder / REFUSED / f"{os.environ['RANK']}.txt").write_text(text, encoding="utf-8")
    end = time.monotonic() + PATIENCE
    while len(_refusals(folder)) < int(os.environ["WORLD_SIZE"]):
        if time.monotonic() > end:
            os._exit(1)
        time.sleep(0.1)


def _refusals(folder: Path) -> list[Path]:
    """What workers left word of, the first one first."""
    return sorted((folder / REFUSED).glob("*.txt"), key=lambda file: file.stat().st_mtime)


def _has_room(workers: int, *, cpu: bool) -> bool:
    """Whether workers get a GPU each; raises ConfigError where Ray would wait for ever."""
    import ray

    there = ray.cluster_resources()
    kind = "CPU" if cpu or not there.get("GPU") else "GPU"
    if there.get(kind, 0) < workers:
        raise ConfigError(
            f"ray_num_workers: {workers}, and the cluster has {there.get(kind, 0):g} {kind}s. Take fewer workers, or "
            "a larger cluster (ray_init_kwargs: address)."
        )
    return kind == "GPU"


def _whole(config: str | dict[str, Any]) -> str | dict[str, Any]:
    return config if isinstance(config, dict) else str(Path(config).expanduser().absolute())


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
