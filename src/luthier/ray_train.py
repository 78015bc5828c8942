"""`luthier train --ray`: the same run in the processes of a Ray cluster, started again when one of them is lost.

Ray Train starts the workers, tells each its rank and connects them; a worker then does what `luthier train` does. The
checkpoints of `output_dir` are what a restarted run goes on from, so every node must see that folder under one name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import ranks
from luthier.core.errors import ConfigError
from luthier.core.log import get_logger
from luthier.ray_worker import STOP, clear, refusals, work
from luthier.run import Run, resolve

if TYPE_CHECKING:
    from luthier.commands import Command
    from luthier.launch import LaunchConfig

log = get_logger("ray")

FOLDER = "ray"
"""In output_dir: what driver and workers leave for one another, and Ray's own files."""
GRACE = 10.0
"""Seconds that Ray's processes have to end."""
POLL = 0.2
"""Seconds between two looks of the driver at what the workers left."""
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray would report to its makers
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # tells only a training function that asks, and prints a warning
    # Lines that differ in their numbers alone would be taken for the same; of a lost worker we say so ourselves.
    "RAY_DEDUP_LOGS_ALLOW_REGEX": "^(?!.*A worker died or was killed)",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed",
}
RESTARTS = 3
"""How often a run is started again; MAX_RESTARTS says otherwise."""


def main(command: Command) -> int:
    """Train as `command` says; returns the exit code, 128 + n if signal n stopped the run after a checkpoint."""
    from luthier.launch import whole_number

    run = resolve(command.config, command.overrides, verb="train")
    restarts = whole_number(os.environ, "MAX_RESTARTS", RESTARTS, least=0)
    run.announce(log)
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("--ray needs Ray, which is not installed: pip install 'luthier[ray]'")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    folder = Path(run.training["output_dir"]).expanduser().absolute() / FOLDER
    clear(folder)
    with _cluster(run.launch):
        each = share(run.launch, ray.cluster_resources(), cpu=bool(run.training.get("use_cpu")))
        workers = run.launch.ray_num_workers
        log.info("Starting %d workers on Ray; if one is lost, all start again, %d times at most.", workers, restarts)
        trainer = _trainer(run, command, each, folder, restarts)
        return _outcome(attend(trainer.fit, folder), folder, restarts)


@contextlib.contextmanager
def _cluster(launch: LaunchConfig) -> Iterator[None]:
    """A connection to Ray. Where Ray was started for it, nothing of it is left afterwards."""
    import psutil
    import ray

    here = psutil.Process()
    before = set(here.children(recursive=True))
    try:
        ray.init(**init_arguments(launch))
    except (AssertionError, ConnectionError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"ray_init_kwargs: {launch.ray_init_kwargs}: ray.init says: {_reason(error)} Leave the key out to start "
            "Ray here, or give the address of a cluster that is running."
        ) from error
    try:
        yield
    finally:
        family = [child for child in here.children(recursive=True) if child not in before]
        ray.shutdown()
        for child in psutil.wait_procs(family, timeout=GRACE)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def init_arguments(launch: LaunchConfig) -> dict[str, Any]:
    """Of `ray.init`: what Ray's own processes say between our lines is left out unless it is an error."""
    import ray

    quiet = {"logging_level": logging.ERROR, "logging_config": ray.LoggingConfig(log_level="ERROR")}
    return {**quiet, "include_dashboard": False, **(launch.ray_init_kwargs or {})}


def share(launch: LaunchConfig, there: Mapping[str, float], *, cpu: bool) -> dict[str, float]:
    """What each worker takes of a cluster that has `there`.

    A CPU and a GPU, where resources_per_worker does not say otherwise; GPUs are left out on a cluster without any.
    Raises ConfigError where a cluster that Ray starts here, which never grows, has too little.
    """
    each = {"CPU": 1, "GPU": 1, **(launch.resources_per_worker or {})}
    if cpu or not there.get("GPU"):
        del each["GPU"]
    short = [name for name, amount in each.items() if there.get(name, 0) < amount * launch.ray_num_workers]
    if not short:
        return each
    text = "; ".join(f"{each[name]:g} {name} each, and the cluster has {there.get(name, 0):g}" for name in short)
    text = f"ray_num_workers: {launch.ray_num_workers} want {text}."
    address = (launch.ray_init_kwargs or {}).get("address") or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        raise ConfigError(f"{text} Take fewer workers, or a larger cluster (ray_init_kwargs: {{address: ...}}).")
    log.warning("%s The run waits until there is more.", text)
    return each


def attend(run: Callable[[], Any], folder: Path) -> Future[Any]:
    """Do `run` in a thread of its own, so that signals reach this one; what came of it.

    The first SIGTERM or Ctrl-C asks the workers to stop after a checkpoint, a second Ctrl-C raises KeyboardInterrupt.
    Not done: a worker left word of what no restart can mend.
    """
    found: Future[Any] = Future()

    def keep() -> None:
        try:
            found.set_result(run())
        except BaseException as error:
            found.set_exception(error)

    with _passing_on(folder / STOP):
        threading.Thread(target=keep, daemon=True, name="ray-train").start()
        while not found.done() and not refusals(folder):
            wait([found], timeout=POLL)
    return found


@contextlib.contextmanager
def _passing_on(file: Path) -> Iterator[None]:
    """Signals become a file, which the workers look for after each step."""
    received: list[int] = []

    def catch(number: int, frame: object) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        again = " Press Ctrl-C again to stop at once, without saving." if number == signal.SIGINT else ""
        os.write(2, f"\n{signal.Signals(number).name}: stopping after this step.{again}\n".encode())
        received.append(number)
        file.write_text(str(number), encoding="utf-8")

    before = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _outcome(found: Future[Any], folder: Path, restarts: int) -> int:
    """The exit code; says why where the run failed."""
    if words := refusals(folder):
        code, _, text = words[0].read_text(encoding="utf-8").partition("\n")
        print(text, file=sys.stderr)
        return int(code)
    error = found.exception()
    if error is None:
        stopped_by = found.result().return_value
        return 0 if stopped_by is None else 128 + stopped_by
    from ray.train import TrainingFailedError

    if not isinstance(error, TrainingFailedError):
        raise error
    print(f"error: the run failed {restarts + 1} times on Ray; the last time: {error}", file=sys.stderr)
    return 1


def _trainer(run: Run, command: Command, each: Mapping[str, float], folder: Path, restarts: int) -> Any:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    launch = run.launch
    return TorchTrainer(
        work,
        train_loop_config={
            "config": _whole(command.config),
            "overrides": command.overrides,
            "cwd": os.getcwd(),
            "folder": str(folder),
            "started": time.time(),
        },
        torch_config=TorchConfig(timeout_s=int(run.training.get("ddp_timeout", 1800))),
        scaling_config=ScalingConfig(
            num_workers=launch.ray_num_workers,
            use_gpu="GPU" in each,
            resources_per_worker=dict(each),
            placement_strategy=launch.placement_strategy,
        ),
        run_config=RunConfig(
            name=launch.ray_run_name or time.strftime("%Y%m%d-%H%M%S"),
            storage_path=str(Path(launch.ray_storage_path or folder).expanduser().absolute()),
            failure_config=FailureConfig(max_failures=restarts),
            logging_config=LoggingConfig(log_level="CRITICAL"),
            callbacks=[_speaker(restarts)],
        ),
    )


def _speaker(restarts: int) -> Any:
    """What says, in Ray's controller, that a worker is lost."""
    from ray.train import UserCallback

    class Speaker(UserCallback):
        failures = 0

        def after_exception(self, run_context: object, worker_exceptions: Mapping[int, Exception]) -> None:
            self.failures += 1
            if self.failures <= restarts:
                print(lost(worker_exceptions, self.failures, restarts), file=sys.stderr, flush=True)

    return Speaker()


def lost(failures: Mapping[int, Exception], count: int, restarts: int) -> str:
    """Which workers are gone and what comes of it. Those that only missed another one are left out."""
    first = {rank: _reason(error) for rank, error in sorted(failures.items())}
    own = {rank: text for rank, text in first.items() if not any(sign in text for sign in ranks.LOST)} or first
    text = "; ".join(f"rank {rank} was lost: {reason.rstrip('.')}" for rank, reason in own.items())
    return f"{text}. All start again from the last checkpoint, {count} of {restarts} times."


def _whole(config: str | dict[str, Any]) -> str | dict[str, Any]:
    return config if isinstance(config, dict) else str(Path(config).expanduser().absolute())


def _reason(error: Exception) -> str:
    if "worker process has died" in str(error):
        return "its process ended; most often the machine ran out of memory"
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[-1].strip()
