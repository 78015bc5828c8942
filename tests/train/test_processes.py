"""What processes must have in common, asked by two that are connected, and of checkpoints that others wrote."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tests.e2e.killing import in_ranks

from luthier.core.errors import CheckpointError, ConfigError
from luthier.train import processes


def ask(tmp_path, *, nodes=2, shared, each=False, sharded=False) -> list[str]:
    """What each of two processes answers; each is a node of its own where there are two nodes."""
    for rank in range(2):
        (tmp_path / str(rank) / "out").mkdir(parents=True)

    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        os.chdir(tmp_path / ("0" if shared else str(rank)))
        args = SimpleNamespace(
            world_size=2,
            process_index=rank,
            local_process_index=rank if nodes == 1 else 0,
            device=torch.device("cpu"),
            output_dir="out",
            do_train=True,
            save_on_each_node=each,
        )
        said = "fine"
        try:
            processes.one_folder(args, sharded=sharded)
        except ConfigError as error:
            said = str(error)
        (tmp_path / f"{rank}.txt").write_text(said)
        assert not list(Path("out").iterdir()) or rank, "the mark is taken away"

    assert in_ranks(work) == [0, 0]
    return [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]


@pytest.mark.parametrize(
    "case, words",
    [
        ({"shared": True}, "fine"),
        ({"shared": True, "nodes": 1, "each": True}, "fine"),
        ({"shared": False}, "is not there for rank 1"),
        ({"shared": False, "each": True}, "fine"),
        ({"shared": False, "each": True, "sharded": True}, "FSDP and DeepSpeed need that"),
        ({"shared": True, "each": True}, "save_on_each_node: true lets every node write"),
    ],
)
def test_nodes_and_their_output_folder(tmp_path, monkeypatch, case, words):
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    for said in ask(tmp_path, **case):
        assert words in said, said


def test_alone_nothing_is_asked(tmp_path):
    processes.one_folder(SimpleNamespace(world_size=1, do_train=True), sharded=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "file, engine",
    [
        ("optimizer.pt", processes.PLAIN),
        ("pytorch_model_fsdp.bin", processes.FSDP_WHOLE),
        ("pytorch_model_fsdp_0/.metadata", processes.FSDP_PARTS),
        ("global_step8/mp_rank_00_model_states.pt", processes.DEEPSPEED),
    ],
)
def test_a_checkpoint_of_another_engine_is_refused(tmp_path, file, engine):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    engines = {processes.PLAIN, processes.FSDP_WHOLE, processes.FSDP_PARTS, processes.DEEPSPEED}
    processes.same_engine(tmp_path, engine)
    for other in engines - {engine}:
        with pytest.raises(CheckpointError) as caught:
            processes.same_engine(tmp_path, other)
        assert f"was written by {engine}, and this run is {other}" in str(caught.value)


def test_weights_alone_fit_all_and_no_folder_fits_none(tmp_path):
    (tmp_path / "model.safetensors").touch()
    processes.same_engine(tmp_path, processes.FSDP_PARTS)
    with pytest.raises(CheckpointError, match="not on this node"):
        processes.same_engine(tmp_path / "checkpoint-4", processes.PLAIN)
