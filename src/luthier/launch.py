"""`luthier train`: in this process, in one process for each device (torchrun), or through Ray.

several accelerators, FORCE_TORCHRUN, NPROC_PER_NODE or NNODES above 1, deepspeed or fsdp     torchrun
--ray, USE_RAY                                                                                 Ray
else, and in each of the processes that were started                                           here
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from luthier import ranks
from luthier.commands import parse_command
from luthier.core.errors import ConfigError
from luthier.core.kinds import is_true
from luthier.torchrun import Plan, devices, run


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How a run is started on a Ray cluster (`luthier train --ray`)."""

    ray_num_workers: int = 1
    """Processes on the Ray cluster, each with a GPU where the cluster has any."""
    ray_init_kwargs: dict[str, Any] | None = None
    """Arguments of `ray.init`, such as {address: auto} for a cluster that is running. Unset: Ray starts here."""
    resources_per_worker: dict[str, float] | None = None
    """What a worker takes of the cluster, such as {CPU: 4, GPU: 1}. Unset: a CPU, and a GPU where there is any."""
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Workers on as few nodes as they fit on (PACK), or on as many as there are (SPREAD); STRICT_ insists."""
    ray_run_name: str | None = None
    """What Ray calls the run. Unset: the time."""
    ray_storage_path: str | None = None
    """Folder for Ray's own files; the model is written to output_dir. Unset: ray/ in output_dir."""

    def __post_init__(self) -> None:
        if self.ray_num_workers < 1:
            raise ConfigError(f"ray_num_workers: expected at least 1, got {self.ray_num_workers}.")


def main(argv: Sequence[str]) -> int:
    """`luthier train CONFIG [key=value ...]`."""
    if ranks.started():
        ranks.follow_parent()
        return _here(argv)
    command = parse_command(argv, "train")
    if command.flags["ray"] or _true(os.environ, "USE_RAY"):
        from luthier import ray_train

        return ray_train.main(command)
    quiet = "--debug" not in sys.argv
    if quiet and _nodes(os.environ) != "1":
        # The node that ends last meets a closed door, and torch has a page to say of it. Read when torch is imported.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    plan = wanted(_keys(command.config, command.overrides), os.environ)
    return _here(argv) if plan is None else run(plan, argv, quiet=quiet)


def wanted(keys: Mapping[str, Any], environ: Mapping[str, str]) -> Plan | None:
    """How to start this run's processes; None where one process, this one, is enough.

    keys: the configuration as given. Reads LLaMA-Factory's variables: FORCE_TORCHRUN, NPROC_PER_NODE, NNODES (or
    MIN_NNODES and MAX_NNODES), NODE_RANK, MASTER_ADDR, MASTER_PORT, RDZV_ID, MAX_RESTARTS. Raises ConfigError.
    """
    cpu = _true(keys, "use_cpu") or _true(keys, "no_cuda")
    processes = whole_number(environ, "NPROC_PER_NODE", 1 if cpu else max(devices(), 1), least=1)
    nodes = _nodes(environ)
    asked = _true(environ, "FORCE_TORCHRUN") or processes > 1 or nodes != "1"
    engine = any(keys.get(name) not in (None, False, "", "false") for name in ("deepspeed", "fsdp"))
    if not asked and not engine:
        return None
    rdzv_id = environ.get("RDZV_ID") or None
    plan = Plan(
        processes,
        nodes,
        None if nodes == "1" or rdzv_id else whole_number(environ, "NODE_RANK", -1, least=0),
        environ.get("MASTER_ADDR") or None,
        whole_number(environ, "MASTER_PORT", 0, least=1) or None,
        rdzv_id,
        whole_number(environ, "MAX_RESTARTS", 0, least=0),
    )
    _check(plan)
    return plan


def _here(argv: Sequence[str]) -> int:
    from luthier.fit import main as train

    with ranks.parting():
        return train(argv)


def _keys(config: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> Mapping[str, Any]:
    from luthier.core.config import read

    return read(config, overrides).values


def _true(values: Mapping[str, Any], name: str) -> bool:
    return is_true(values.get(name, ""))


def whole_number(environ: Mapping[str, str], name: str, default: int, *, least: int) -> int:
    """The number that an environment variable holds, `default` where it is unset. Raises ConfigError."""
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
