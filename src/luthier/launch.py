"""`luthier train`: in this process, in one process for each device (torchrun), or through Ray.

    several accelerators, FORCE_TORCHRUN, NPROC_PER_NODE or NNODES above 1, deepspeed or fsdp     torchrun
    --ray, USE_RAY                                                                                 Ray
    else, and in each of the processes that were started                                           here

torchrun runs inside this process, as its Python interface: arguments stay whole, exit codes and signals pass through.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier import ranks
from luthier.core import log as logs
from luthier.core.errors import ConfigError, LuthierError
from luthier.core.kinds import is_true
from luthier.train.resume import STARTED

log = logs.get_logger("launch")

PROGRAM = ("-m", "luthier", "train")
GRACE = 600
"""Seconds the processes have for their checkpoint after a signal; TORCH_ELASTIC_SHUTDOWN_TIMEOUT says otherwise."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How a run is started on a Ray cluster (`luthier train --ray`)."""

    ray_num_workers: int = 1
    """Processes on the Ray cluster, each with a GPU where the cluster has any."""
    ray_init_kwargs: dict[str, Any] | None = None
    """Arguments of `ray.init`, such as {address: auto} for a cluster that is running. Unset: Ray starts here."""

    def __post_init__(self) -> None:
        if self.ray_num_workers < 1:
            raise ConfigError(f"ray_num_workers: expected at least 1, got {self.ray_num_workers}.")


class LaunchError(LuthierError, RuntimeError):
    """The processes of a run could not be started or found each other."""


@dataclass(frozen=True)
class Plan:
    """How many processes, and how they find each other."""

    processes: int
    """On this node."""
    nodes: str = "1"
    """A number, or MIN:MAX for an elastic run."""
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    rdzv_id: str | None = None
    restarts: int = 0

    @property
    def elastic(self) -> bool:
        """Nodes meet under a name instead of by their numbers, and may come and go."""
        return self.rdzv_id is not None

    def options(self) -> list[str]:
        """As torchrun's arguments."""
        found = ["--nproc-per-node", str(self.processes), "--nnodes", self.nodes, "--max-restarts", str(self.restarts)]
        if self.elastic:
            endpoint = f"{self.master_addr or 'localhost'}:{self.master_port or 29500}"
            found += ["--rdzv-backend", "c10d", "--rdzv-id", str(self.rdzv_id), "--rdzv-endpoint", endpoint]
        else:
            for name in ("node_rank", "master_addr", "master_port"):
                value = getattr(self, name)
                found += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
        return found

    def __str__(self) -> str:
        text = f"Starting {self.processes} process{'es' * (self.processes > 1)} on this node"
        if self.elastic:
            return f"{text}; {self.nodes} nodes meet at {self.master_addr or 'localhost'} as {self.rdzv_id}."
        if self.nodes != "1":
            where = f"{self.master_addr}:{self.master_port or 29500}"
            return f"{text}, which is number {self.node_rank} of {self.nodes}; they meet at {where}."
        return f"{text}."


def main(argv: Sequence[str]) -> int:
    """`luthier train CONFIG [key=value ...]`."""
    from luthier.cli import parse_command

    if ranks.started():
        ranks.follow_parent()
        return _here(argv)
    command = parse_command(argv, "train")
    if command.flags["ray"] or _true(os.environ, "USE_RAY"):
        from luthier import ray_train

        return ray_train.main(command)
    plan = wanted(_keys(command.config, command.overrides), os.environ)
    return _here(argv) if plan is None else run(plan, argv)


def wanted(keys: Mapping[str, Any], environ: Mapping[str, str]) -> Plan | None:
    """How to start this run's processes; None where one process, this one, is enough.

    keys: the configuration as given. Reads LLaMA-Factory's variables: FORCE_TORCHRUN, NPROC_PER_NODE, NNODES (or
    MIN_NNODES and MAX_NNODES), NODE_RANK, MASTER_ADDR, MASTER_PORT, RDZV_ID, MAX_RESTARTS. Raises ConfigError.
    """
    cpu = _true(keys, "use_cpu") or _true(keys, "no_cuda")
    devices = 0 if cpu else _devices()
    processes = _number(environ, "NPROC_PER_NODE", max(devices, 1), least=1)
    nodes = _nodes(environ)
    asked = _true(environ, "FORCE_TORCHRUN") or processes > 1 or nodes != "1"
    engine = any(keys.get(name) not in (None, False, "", "false") for name in ("deepspeed", "fsdp"))
    if not asked and not engine:
        return None
    rdzv_id = environ.get("RDZV_ID") or None
    plan = Plan(
        processes,
        nodes,
        None if nodes == "1" or rdzv_id else _number(environ, "NODE_RANK", -1, least=0),
        environ.get("MASTER_ADDR") or None,
        _number(environ, "MASTER_PORT", 0, least=1) or None,
        rdzv_id,
        _number(environ, "MAX_RESTARTS", 0, least=0),
    )
    _check(plan)
    return plan


def run(plan: Plan, argv: Sequence[str], *, program: Sequence[str] = PROGRAM) -> int:
    """Start the processes, each `program` with `argv`, and wait for them; returns the exit code of the run."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    log.info("%s", plan)
    with tempfile.TemporaryDirectory(prefix="luthier-launch-") as folder:
        args = torchrun.parse_args([*plan.options(), "--log-dir", folder, *program, *argv])
        # A run under nohup ignores SIGHUP; torchrun would end it when the terminal closes.
        args.signals_to_handle = ",".join(_signals())
        _prepare(plan)
        try:
            with _impatience():
                torchrun.run(args)
        except ChildFailedError as error:
            return _failed(error, Path(folder))
        except SignalException as stop:
            _send(signal.SIGKILL)  # nothing of this run is left when its launcher ends
            return 128 + int(stop.sigval)
        except (RuntimeError, OSError) as error:
            _send(signal.SIGKILL)  # nothing of this run is left when its launcher ends
            raise LaunchError(_meeting(plan, error)) from error
    return 0


def _here(argv: Sequence[str]) -> int:
    from luthier.fit import main as train

    with ranks.parting():
        return train(argv)


def _keys(config: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> Mapping[str, Any]:
    from luthier.core.config import read

    return read(config, overrides).values


def _devices() -> int:
    """Accelerators this process may use."""
    if _true(os.environ, "ACCELERATE_USE_CPU"):
        return 0
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _true(values: Mapping[str, Any], name: str) -> bool:
    return is_true(values.get(name, ""))


def _number(environ: Mapping[str, str], name: str, default: int, *, least: int) -> int:
    text = environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdigit() or int(text) < least:
        raise ConfigError(f"{name}={text}: expected a whole number from {least} on.")
    return int(text)


def _nodes(environ: Mapping[str, str]) -> str:
    text = environ.get("NNODES", "").strip()
    least, most = environ.get("MIN_NNODES", "").strip(), environ.get("MAX_NNODES", "").strip()
    text = f"{least}:{most}" if least and most else text or "1"
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2] or match[1]):
        raise ConfigError(f"NNODES={text}: expected a number of nodes such as 2, or MIN:MAX such as 1:4.")
    return match[1] if match[2] in (None, match[1]) else text


def _check(plan: Plan) -> None:
    if plan.elastic and plan.nodes != "1" and plan.master_addr is None:
        raise ConfigError(f"RDZV_ID={plan.rdzv_id} needs MASTER_ADDR, the node all others meet at (and MASTER_PORT).")
    if plan.elastic or plan.nodes == "1":
        return
    if ":" in plan.nodes:
        raise ConfigError(f"NNODES={plan.nodes} is elastic and needs RDZV_ID, a name that is the same on all nodes.")
    if plan.restarts:
        raise ConfigError(f"MAX_RESTARTS={plan.restarts} with several nodes needs RDZV_ID, a name shared by all nodes.")
    if plan.master_addr is None:
        raise ConfigError(f"NNODES={plan.nodes} needs MASTER_ADDR, the address of node 0, on every node.")
    if plan.node_rank == -1:
        raise ConfigError(f"NNODES={plan.nodes} needs NODE_RANK, this node's number from 0 on.")
    if int(plan.node_rank or 0) >= int(plan.nodes):
        raise ConfigError(f"NODE_RANK={plan.node_rank}: with NNODES={plan.nodes} nodes are numbered from 0 on.")


def _signals() -> list[str]:
    names = ["SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP"]
    return [name for name in names if signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN]


def _prepare(plan: Plan) -> None:
    """What the processes find in their environment, and how little torchrun says itself."""
    os.environ[STARTED] = str(time.time())
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE))
    if not _devices():
        # torchrun would give each process one thread; on a CPU they share the cores.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // plan.processes)))
    if "--debug" not in sys.argv:
        logging.disable(logging.ERROR)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _failed(error: Any, folder: Path) -> int:
    """The exit code of the process that failed first; says why, where the process could not say it itself."""
    said = ranks.failed_first(folder)
    rank, failure = next(iter(error.failures.items()))
    killed = [(r, f.exitcode) for r, f in error.failures.items() if f.exitcode in (-signal.SIGKILL, -signal.SIGSEGV)]
    if failure.exitcode < 0 or (said == 1 and killed):
        rank, code = (rank, failure.exitcode) if failure.exitcode < 0 else killed[0]
        name = signal.Signals(-code).name
        hint = " Most often the machine ran out of memory." if code == -signal.SIGKILL else ""
        print(f"error: the process of rank {rank} was ended by {name}.{hint}", file=sys.stderr)
        return 128 - code
    return failure.exitcode if said is None else said


@contextlib.contextmanager
def _impatience() -> Iterator[None]:
    """Pass a second signal on, and end everything at a third: torchrun passes the first on and then only waits."""
    seen, written = os.pipe()
    os.set_blocking(written, False)

    def watch() -> None:
        for count, number in enumerate(iter(lambda: os.read(seen, 1), b""), 1):
            if count > 1:
                _send(signal.Signals(number[0]) if count == 2 else signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    before = signal.set_wakeup_fd(written)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(written)


def _send(number: signal.Signals) -> None:
    """Give a signal to every process of this run but the launcher."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(number)


def _meeting(plan: Plan, error: Exception) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if plan.nodes == "1":
        return f"The processes could not be started: {text}"
    where = f"{plan.master_addr}:{plan.master_port or 29500}"
    return (
        f"The nodes did not meet at {where}: {text}. Expected: the same MASTER_ADDR, MASTER_PORT and NNODES on every "
        "node, each with its own NODE_RANK, a port that is free on node 0 and open to the others."
    )
