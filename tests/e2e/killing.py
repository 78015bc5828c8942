"""Runs that are killed at a chosen event, in forks of this process: imports are paid once."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from accelerate.state import AcceleratorState

from luthier.core import manifest
from luthier.fit import fit
from luthier.run import resolve
from luthier.train import checkpoint, saving
from luthier.train.runlog import RunLog
from luthier.train.trainer import Trainer

PATIENCE = 120
"""Seconds after which a child that hangs is ended."""

EVENTS = [
    (torch.optim.AdamW, "step"),
    (torch, "save"),
    (safetensors.torch, "save_file"),
    (transformers.TrainerState, "save_to_json"),
    (Trainer, "training_step"),
    (Trainer, "log"),
    (Trainer, "ask"),
    (Trainer, "evaluation_loop"),
    (Trainer, "_save_checkpoint"),
    (Trainer, "_stage"),
    (Trainer, "_save_weights"),
    (Trainer, "_pick_up"),
    (Trainer, "save_final"),
    (RunLog, "__init__"),
    (RunLog, "append"),
    (manifest, "seal"),
    (manifest, "flush"),
    (checkpoint, "publish"),
    (checkpoint, "publish_into"),
    (checkpoint, "rotate"),
    (checkpoint, "last_whole"),
    (checkpoint, "sweep"),
    (saving, "snapshot"),
    (Path, "rename"),
    (Path, "write_text"),
    (os, "replace"),
    (shutil, "rmtree"),
]
"""Calls before and after which a process may die: everything that changes the disk or the model."""


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a fork; its exit code, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(_fork(work), 0)[1])


def _fork(work: Callable[[], None]) -> int:
    gc.freeze()  # what is there already need not be looked through in the child
    pid = os.fork()
    if pid:
        gc.unfreeze()
        return pid
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(PATIENCE)
    torch.set_num_threads(1)  # threads of the parent's are not there, and would be waited for
    code = 1
    try:
        work()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def in_ranks(work: Callable[[int], None], world: int = 2) -> list[int]:
    """Run `work(rank)` in as many forks, which find each other through gloo; their exit codes, in order of rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def one(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        # What this process found out about itself when it was alone.
        AcceleratorState._reset_state(reset_partial_state=True)
        work(rank)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()

    pids = [_fork(lambda rank=rank: one(rank)) for rank in range(world)]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def straight(keys: Mapping[str, object]) -> list[str]:
    """Run it in this process, to its end; returns what happened, by name. Children find everything imported."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as children have it: sums depend on it
    try:
        with pytest.MonkeyPatch.context() as patch:
            seen = _watch(patch, die_at=-1)
            fit(resolve(dict(keys)))
            return seen
    finally:
        torch.set_num_threads(threads)


def moment(events: list[str], *names: str) -> int:
    """The number of the event at which the last of `names` happens, after the first after the one before it."""
    place = -1
    for name in names:
        place = events.index(name, place + 1)
    return place + 1


def train(keys: Mapping[str, object], *, die_at: int = -1) -> int:
    """`luthier train` in a child that dies by SIGKILL at event `die_at`; -9 if it did, 0 if it came to its end."""
    run = resolve(dict(keys))

    def work() -> None:
        with pytest.MonkeyPatch.context() as patch:
            _watch(patch, die_at)
            fit(run)

    return in_child(work)


def _watch(patch: pytest.MonkeyPatch, die_at: int) -> list[str]:
    seen: list[str] = []

    def event(name: str) -> None:
        seen.append(name)
        if len(seen) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(function, name):
        def call(*args, **kwargs):
            event(f"{name} begins")
            try:
                return function(*args, **kwargs)
            finally:
                event(f"{name} ends")

        return call

    for owner, name in EVENTS:
        patch.setattr(owner, name, wrapped(getattr(owner, name), name))
    return seen


MOVING = {"elapsed_time", "remaining_time", "throughput", "tokens_per_second", "train_runtime"}
MOVING |= {f"{kind}_{what}" for kind in ("train", "eval") for what in ("runtime", "samples_per_second")}
MOVING |= {"train_steps_per_second", "eval_steps_per_second"}
"""What says how fast it went."""


def left_behind(folder: Path) -> dict[str, object]:
    """All that must be the same after two runs, by name: bytes of weights and states, numbers of logs."""
    found: dict[str, object] = {}
    for where in (folder, *checkpoint.complete(folder)):
        for file in sorted(where.iterdir()):
            if file.suffix in (".safetensors", ".pt", ".pth") or file.name.startswith("loop_state"):
                found[str(file.relative_to(folder))] = file.read_bytes()
        if (where / "trainer_state.json").exists():
            state = json.loads((where / "trainer_state.json").read_text())
            found[f"{where.name if where != folder else ''}/log_history"] = [
                still(line) for line in state["log_history"]
            ]
            found[f"{where.name if where != folder else ''}/best"] = state["best_metric"]
    lines = (folder / "trainer_log.jsonl").read_text().splitlines()
    found["log"] = [still(json.loads(line)) for line in lines]
    found["results"] = still(json.loads((folder / "train_results.json").read_text()))
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    return found


def still(line: Mapping[str, object]) -> dict[str, object]:
    """A line of a log without what says how fast it went."""
    return {key: value for key, value in line.items() if key not in MOVING}


def differing(a: Mapping[str, object], b: Mapping[str, object]) -> list[str]:
    """What is not the same in both."""
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
