"""Who starts how many processes, read from LLaMA-Factory's environment variables."""

from __future__ import annotations

import pytest

from luthier import launch, ranks
from luthier.core.errors import ConfigError
from luthier.torchrun import Plan

TWO_NODES = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that this machine has so many accelerators."""

    def pretend(count):
        monkeypatch.setattr(launch, "devices", lambda: count)

    pretend(0)
    return pretend


def test_one_process_is_this_one(gpus):
    assert launch.wanted({}, {}) is None
    gpus(1)
    assert launch.wanted({}, {}) is None
    gpus(8)
    assert launch.wanted({"use_cpu": "true"}, {}) is None
    assert launch.wanted({"use_cpu": True, "deepspeed": ""}, {}) is None


@pytest.mark.parametrize(
    "count, keys, environ, plan",
    [
        (4, {}, {}, Plan(4)),
        (4, {}, {"NPROC_PER_NODE": "2"}, Plan(2)),
        (0, {}, {"NPROC_PER_NODE": "2"}, Plan(2)),
        (0, {}, {"FORCE_TORCHRUN": "1"}, Plan(1)),
        (1, {"deepspeed": "ds.json"}, {}, Plan(1)),
        (1, {"fsdp": True}, {}, Plan(1)),
        (4, {}, {"NPROC_PER_NODE": "1"}, None),
        (1, {}, TWO_NODES, Plan(1, "2", 1, "10.0.0.1")),
        (8, {}, TWO_NODES | {"MASTER_PORT": "4000"}, Plan(8, "2", 1, "10.0.0.1", 4000)),
        (
            2,
            {},
            {"NNODES": "1:3", "RDZV_ID": "job", "MASTER_ADDR": "a", "MAX_RESTARTS": "5"},
            Plan(2, "1:3", None, "a", None, "job", 5),
        ),
        (
            2,
            {},
            {"MIN_NNODES": "2", "MAX_NNODES": "4", "RDZV_ID": "job", "MASTER_ADDR": "a"},
            Plan(2, "2:4", None, "a", None, "job"),
        ),
    ],
)
def test_plans(gpus, count, keys, environ, plan):
    gpus(count)
    assert launch.wanted(keys, environ) == plan


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"NPROC_PER_NODE": "gpu"}, "NPROC_PER_NODE=gpu: expected a whole number from 1"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE=0"),
        ({"NNODES": "4:2"}, "NNODES=4:2: expected"),
        ({"NNODES": "two"}, "NNODES=two"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "needs MASTER_ADDR"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "needs NODE_RANK"),
        (TWO_NODES | {"NODE_RANK": "2"}, "numbered from 0"),
        (TWO_NODES | {"MASTER_PORT": "http"}, "MASTER_PORT=http"),
        ({"NNODES": "1:2", "MASTER_ADDR": "a"}, "is elastic and needs RDZV_ID"),
        (TWO_NODES | {"MAX_RESTARTS": "1"}, "with several nodes needs RDZV_ID"),
        ({"NNODES": "2", "RDZV_ID": "job"}, "needs MASTER_ADDR"),
    ],
)
def test_what_cannot_be(gpus, environ, words):
    with pytest.raises(ConfigError, match=words):
        launch.wanted({}, environ)


@pytest.mark.parametrize(
    "plan, expected",
    [
        # One node finds itself, on any free port.
        (Plan(2), {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "rdzv_backend": "static"}),
        (
            Plan(3, "2", 1, "10.0.0.1", 4000),
            {
                "min_nodes": 2,
                "max_nodes": 2,
                "nproc_per_node": 3,
                "rdzv_backend": "static",
                "rdzv_endpoint": "10.0.0.1:4000",
                "rdzv_configs": {"rank": 1, "timeout": 900},
                "max_restarts": 0,
            },
        ),
        (
            Plan(1, "1:3", None, "10.0.0.1", None, "a job", 5),
            {
                "min_nodes": 1,
                "max_nodes": 3,
                "rdzv_backend": "c10d",
                "rdzv_endpoint": "10.0.0.1:29500",
                "run_id": "a job",
                "max_restarts": 5,
            },
        ),
    ],
)
def test_torchrun_understands_the_plan(plan, expected):
    from torch.distributed import run

    words = ["-m", "luthier", "train", "a b.yaml", "output_dir=x y", "--flag"]
    config, command, arguments = run.config_from_args(run.parse_args([*plan.options(), *words]))
    assert {name: getattr(config, name) for name in expected} == expected
    assert arguments[-5:] == words[1:], "paths with blanks stay whole"


def test_a_process_that_was_started_starts_no_more(gpus, monkeypatch):
    gpus(8)
    calls = []
    monkeypatch.setattr(launch, "_here", lambda argv: calls.append(argv) or 0)
    monkeypatch.setattr(ranks, "follow_parent", lambda: None)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    assert launch.main(["x.yaml"]) == 0 and calls == [["x.yaml"]]


def test_the_configuration_is_asked_before_anything_starts(gpus, monkeypatch, tmp_path):
    gpus(4)
    started = []
    monkeypatch.setattr(launch, "run", lambda plan, argv, quiet: started.append((plan, argv, quiet)) or 7)
    for name in ("RANK", "WORLD_SIZE", "NPROC_PER_NODE", "NNODES", "FORCE_TORCHRUN", "USE_RAY"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "a b.yaml"
    file.write_text("stage: sft\n")
    assert launch.main([str(file), "output_dir=x y"]) == 7
    assert started == [(Plan(4), [str(file), "output_dir=x y"], True)]
    monkeypatch.setattr(launch, "_here", lambda argv: 5)
    assert launch.main([str(file), "use_cpu=true"]) == 5
    with pytest.raises(ConfigError, match="no configuration file"):
        launch.main(["missing.yaml"])
