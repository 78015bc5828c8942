"""torchrun inside this process, as a Python interface: arguments stay whole, exit codes and signals pass through."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier import ranks
from luthier.core import log as logs
from luthier.core.errors import LuthierError
from luthier.core.kinds import is_true
from luthier.train.resume import STARTED

log = logs.get_logger("launch")

PROGRAM = ("-m", "luthier", "train")
GRACE = 600
"""Seconds the processes have for their checkpoint after a signal; TORCH_ELASTIC_SHUTDOWN_TIMEOUT says otherwise."""


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


def run(plan: Plan, argv: Sequence[str], *, program: Sequence[str] = PROGRAM, quiet: bool = True) -> int:
    """Start the processes, each `program` with `argv`, and wait for them; returns the exit code of the run.

    quiet: leave out what torchrun says itself. Raises LaunchError where the processes do not find each other.
    """
    from torch.distributed import run as launcher
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    log.info("%s", plan)
    with tempfile.TemporaryDirectory(prefix="luthier-launch-") as folder:
        words = [*program, *argv] if quiet else [*program, *argv, "--debug"]
        args = launcher.parse_args([*plan.options(), "--log-dir", folder, *words])
        # A run under nohup ignores SIGHUP; torchrun would end it when the terminal closes.
        args.signals_to_handle = ",".join(_signals())
        try:
            with _prepared(plan, quiet=quiet), _impatience():
                launcher.run(args)
        except ChildFailedError as error:
            return _failed(error, Path(folder))
        except SignalException as stop:
            _send(signal.SIGKILL)  # nothing of this run is left when its launcher ends
            return 128 + int(stop.sigval)
        except (RendezvousError, RuntimeError, OSError) as error:
            _send(signal.SIGKILL)  # nothing of this run is left when its launcher ends
            raise LaunchError(_meeting(plan, error)) from error
    return 0


def devices() -> int:
    """Accelerators this process may use."""
    if is_true(os.environ.get("ACCELERATE_USE_CPU", "")):
        return 0
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def interface_to(address: str) -> str | None:
    """The network interface that leads to `address`, where this machine's own name leads nowhere but to itself.

    gloo offers other nodes the address of the machine's name, and on many machines that is 127.0.x.x.
    """
    import psutil

    if not _own_address().startswith("127."):
        return None
    try:
        # Nothing is sent: the system says which of its addresses it would send from.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            ours = probe.getsockname()[0]
    except OSError:
        return None
    if ours.startswith("127."):
        return None
    known = psutil.net_if_addrs().items()
    return next((name for name, places in known if any(place.address == ours for place in places)), None)


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def _signals() -> list[str]:
    names = ["SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP"]
    return [name for name in names if signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN]


@contextlib.contextmanager
def _prepared(plan: Plan, *, quiet: bool) -> Iterator[None]:
    """What the processes find in their environment, and how little torchrun says itself."""
    os.environ[STARTED] = str(time.time())
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE))
    if not devices():
        # torchrun would give each process one thread; on a CPU they share the cores.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // plan.processes)))
    interface = None if plan.nodes == "1" else interface_to(str(plan.master_addr))
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    before = logging.root.manager.disable
    if quiet:
        logging.disable(logging.ERROR)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        yield
    finally:
        logging.disable(before)


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
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in _signals()}
    ends = {getattr(signal, name) for name in handlers}

    def watch() -> None:
        count = 0
        for byte in iter(lambda: os.read(seen, 1), b""):
            # Every signal with a Python handler arrives here; a DataLoader with workers leaves one for SIGCHLD.
            count += byte[0] in ends
            if count > 1 and byte[0] in ends:
                _send(signal.Signals(byte[0]) if count == 2 else signal.SIGKILL)
        os.close(seen)

    threading.Thread(target=watch, daemon=True).start()
    before = signal.set_wakeup_fd(written)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(written)
        for name, handler in handlers.items():  # torchrun leaves its own
            signal.signal(getattr(signal, name), handler)


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
