"""What several processes must have in common before they train: one output folder, one way to keep a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from luthier.core.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import TrainingArguments

PATIENCE = 5.0
"""Seconds that a network file system has to show one node what another wrote."""

PLAIN, DEEPSPEED = "one process or plain data parallelism", "DeepSpeed"
FSDP_WHOLE, FSDP_PARTS = "FSDP (FULL_STATE_DICT)", "FSDP (SHARDED_STATE_DICT)"
_SIGNS = {
    DEEPSPEED: "global_step*",
    FSDP_WHOLE: "pytorch_model_fsdp.bin",
    FSDP_PARTS: "pytorch_model_fsdp_0",
    PLAIN: "optimizer.pt",
}
"""Who writes what into a checkpoint that can be gone on from."""


def one_folder(args: TrainingArguments, *, sharded: bool) -> None:
    """Raise ConfigError, on every process, where nodes do not see the output folder that the keys ask for.

    A checkpoint has a part from every process, and rank 0 completes it: all nodes must see one folder, or each keep
    whole checkpoints of its own (`save_on_each_node: true`), which an engine that shards cannot. All ranks must call
    it, with a group of processes that are connected; the folder must be there.
    """
    if args.world_size == 1 or not args.do_train:
        return
    votes = _votes(args)
    if sum(first for first, _ in votes) < 2:
        return  # one node
    blind = [rank for rank, (_, seen) in enumerate(votes) if not seen]
    if not blind and args.save_on_each_node:
        raise ConfigError(
            f"save_on_each_node: true lets every node write checkpoints, and all of them would write to the same "
            f"{args.output_dir}. Leave the key out where nodes share a file system."
        )
    if not blind or (args.save_on_each_node and not sharded):
        return
    else_ = (
        "FSDP and DeepSpeed need that."
        if sharded
        else "Without a shared file system set save_on_each_node: true; each node then keeps checkpoints of its own."
    )
    raise ConfigError(
        f"output_dir: what rank 0 writes to {args.output_dir} is not there for rank {blind[0]}, and a checkpoint takes "
        f"a part from every process. Choose a folder that all nodes see under the same name. {else_}"
    )


def _votes(args: TrainingArguments) -> list[tuple[bool, bool]]:
    """Of every rank: whether it is the first of its node, and whether it sees what rank 0 writes."""
    import torch.distributed as dist

    mark: list[Any] = [f".meeting-{uuid4().hex}"]
    file = Path(args.output_dir) / mark[0]
    if args.process_index == 0:
        file.touch()
    try:
        dist.broadcast_object_list(mark, src=0, device=args.device)
        votes: list[Any] = [None] * args.world_size
        dist.all_gather_object(votes, (args.local_process_index == 0, _appears(Path(args.output_dir) / mark[0])))
    finally:
        if args.process_index == 0:
            file.unlink()
    return votes


def _appears(file: Path) -> bool:
    end = time.monotonic() + PATIENCE
    while not file.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def same_engine(folder: Path, engine: str) -> None:
    """Raise CheckpointError where a checkpoint's optimiser is not in the form that this run's engine reads.

    engine: one of the names in this module. A checkpoint of weights alone fits all.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is there for rank 0 and not on this node. Copy the checkpoints of one step to every node, or "
            "start afresh with overwrite_output_dir: true."
        )
    writers = [name for name, sign in _SIGNS.items() if any(folder.glob(sign))]
    if not writers or engine in writers:
        return
    raise CheckpointError(
        f"{folder} was written by {writers[0]}, and this run is {engine}, which cannot read that optimiser. Start it "
        "with the keys and the launcher it was begun with, or begin another run from what `luthier export` makes of "
        "the checkpoint."
    )
