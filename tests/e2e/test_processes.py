"""Several processes, as a user starts them: weights cut by FSDP2, and two nodes that are two groups of processes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.distributed.tensor import DTensor

from luthier import cli
from luthier.core import log
from luthier.fit import fit
from luthier.run import resolve
from luthier.train import checkpoint
from luthier.train.trainer import Trainer
from tests.e2e.killing import in_child, in_ranks
from tests.exact.runs import furthest

pytestmark = pytest.mark.e2e

TORCH = r"\[[WE]\d|frame #|#\d+ |Exception raised from|C\+\+ CapturedTraceback|<omitting python frames>"
"""Lines of what torch's C++ side says of a store that the other node closed."""
UNEVEN = [f"{'word ' * (n % 7 + 1)}{n}" for n in range(24)]


def configuration(folder: Path, model: Path, name: str, **changes) -> dict[str, object]:
    """Four steps of eight rows each, by two processes; answers of uneven length."""
    rows = [{"instruction": f"Say {n}", "input": "", "output": answer} for n, answer in enumerate(UNEVEN)]
    (folder / "rows one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(model),
        "stage": "sft",
        "template": "chatml",
        "dataset": str(folder / "rows one.jsonl"),
        "data_cache_dir": str(folder / "cache"),
        "layout": "padded",
        "cutoff_len": 64,
        "output_dir": str(folder / name),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,  # less would blow up rounding where a gradient is near zero
        "max_steps": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        **changes,
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (path for path in folder.glob("*model.safetensors"))
    return safetensors.torch.load_file(file)


def shards(keys, world: int = 2, *, dies_at: int | None = None) -> list[int]:
    """Processes that train with FSDP; each checks that it holds parts. The last one dies before step `dies_at`."""
    step = Trainer.training_step

    def training_step(self, *args):
        # What is around the layers stays whole between a forward pass and the next backward pass.
        layers = [p for name, p in self.model.named_parameters() if ".layers." in name]
        assert all(isinstance(p, DTensor) for p in layers), "on a CPU accelerate would not shard, and not say so"
        assert sum(p.to_local().numel() for p in layers) < 1.1 / world * sum(p.numel() for p in layers)
        if self.state.global_step == dies_at and self.args.process_index == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args)

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        sys.stderr = Path(f"{keys['output_dir']}-{rank}.txt").open("a")
        log.set_up()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "training_step", training_step)
            fit(resolve(dict(keys)))

    return in_ranks(work, world)


@pytest.mark.parametrize(
    "method, kind, parts, then",
    [("full", "SHARDED_STATE_DICT", True, 2), ("lora", "FULL_STATE_DICT", False, 4)],
)
def test_fsdp_killed_and_gone_on_with_ends_where_one_process_ends(tmp_path, model_folder, method, kind, parts, then):
    """Also by another number of processes; `export` reads its checkpoint."""
    method_ = {"finetuning_type": method}
    alone = configuration(tmp_path, model_folder, "alone", **method_, save_strategy="no")
    alone |= {"per_device_train_batch_size": 4}
    fit(resolve(alone))
    keys = configuration(tmp_path, model_folder, "run", **method_, fsdp=True, ddp_backend="gloo")
    keys |= {"fsdp_config": {"version": 2, "state_dict_type": kind}}
    codes = shards(keys, dies_at=3)
    assert codes[1] == -signal.SIGKILL and codes[0] != 0
    last = checkpoint.last_whole(tmp_path / "run")
    assert last is not None and last.name == "checkpoint-2"
    assert (last / "pytorch_model_fsdp_0").is_dir() is parts and any(last.glob("*model.safetensors")) is not parts
    assert shards(keys, then) == [0] * then
    assert furthest(weights(tmp_path / "alone"), weights(tmp_path / "run")) < 1e-6

    named = {"model_name_or_path": str(model_folder), "adapter_name_or_path": str(tmp_path / "run" / "checkpoint-4")}
    named = {"model_name_or_path": named["adapter_name_or_path"]} if method == "full" else named
    arguments = [f"{key}={value}" for key, value in {**named, "template": "chatml"}.items()]
    assert in_child(lambda: sys.exit(cli.main(["export", *arguments, f"export_dir={tmp_path / 'whole'}"]))) == 0
    if method == "full":
        assert furthest(weights(tmp_path / "whole"), weights(tmp_path / "run")) == 0.0
    else:
        assert furthest(weights(tmp_path / "whole"), weights(model_folder)) > 1e-3, "the adapter is in it"


def test_weights_alone_are_whole_also_where_checkpoints_are_in_parts(tmp_path, model_folder):
    keys = configuration(tmp_path, model_folder, "run", finetuning_type="full", fsdp=True, ddp_backend="gloo")
    keys |= {"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}, "save_only_model": True, "max_steps": 2}
    assert shards(keys) == [0, 0]
    assert furthest(weights(tmp_path / "run" / "checkpoint-2"), weights(tmp_path / "run")) == 0.0


def test_what_a_cpu_cannot_offload_is_said(tmp_path, model_folder):
    keys = configuration(tmp_path, model_folder, "run", fsdp=True, ddp_backend="gloo")
    assert shards(keys | {"fsdp_config": {"cpu_offload": True}}) == [1, 1]
    assert "ConfigError: fsdp_config: cpu_offload keeps in main memory" in (tmp_path / "run-0.txt").read_text()


def test_two_nodes_are_two_groups_of_processes(tmp_path, model_folder):
    """Each node's `luthier train` starts its own process; together they train what one process trains."""
    alone = configuration(tmp_path, model_folder, "alone", save_strategy="no", max_steps=3)
    fit(resolve(alone | {"per_device_train_batch_size": 4}))
    keys = configuration(tmp_path, model_folder, "two nodes", max_steps=3)
    file = tmp_path / "my run.yaml"
    file.write_text(json.dumps(keys))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environ = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NPROC_PER_NODE": "1"}
    environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}

    def node(number: int) -> None:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # of a rank; this is what starts one
            del os.environ[name]
        os.environ |= environ | {"NODE_RANK": str(number)}
        os.dup2(os.open(tmp_path / f"node {number}.txt", os.O_CREAT | os.O_WRONLY), 2)
        sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", buffering=0, closefd=False), write_through=True)
        raise SystemExit(cli.main(["train", str(file)]))

    assert in_ranks(node) == [0, 0], "".join(path.read_text() for path in sorted(tmp_path.glob("node*")))
    assert furthest(weights(tmp_path / "alone"), weights(tmp_path / "two nodes")) < 1e-6

    # What the reader of the logs sees: one loss and one speed of the whole job, from node 0, and everybody's memory.
    first, second = ((tmp_path / f"node {n}.txt").read_text() for n in range(2))
    # torch, imported here before `luthier train` could hush it, may report that node 0 closed its store first.
    said = [line for line in second.splitlines() if line and not re.match(TORCH, line)]
    assert said == [f"Starting 1 process on this node, which is number 1 of 2; they meet at 127.0.0.1:{port}."]
    assert re.findall(r"^step (\d)/3 \| loss", first, re.MULTILINE) == ["1", "2", "3"]
    assert re.search(r"^Peak memory of the process: rank 0 \d\.\d\d GiB, rank 1 \d\.\d\d GiB$", first, re.MULTILINE)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "trainer_log.jsonl").read_text().splitlines()]
        for name in ("alone", "two nodes")
    ]
    for one, two in zip(*logs, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    # Padding differs with the cut into micro-batches; whoever counted only its own rows would have half.
    assert logs[1][-1]["total_tokens"] > 0.7 * logs[0][-1]["total_tokens"]
