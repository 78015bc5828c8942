"""Two gloo processes train the model one process trains, although their token counts differ."""

from __future__ import annotations

import faulthandler
import os
import socket
import time

import pytest
import torch
import torch.multiprocessing as mp

from tests.exact.runs import OBJECTIVES, furthest, items_for, objective_of, trainer_for, weights

DEADLINE = 600
"""Seconds; an idle machine needs 40."""


def _rank(rank: int, port: int, folder: str) -> None:
    # Where it waits for ever, if it does, is said before the test gives up on it.
    faulthandler.dump_traceback_later(DEADLINE - 20, exit=True)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    results = {}
    for name in OBJECTIVES:
        trainer = _trainer(name, f"{folder}/{name}", batch=1, ddp_backend="gloo")
        trainer.train()
        trainer.accuracy = True
        evaluated = trainer.evaluate()
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results[name] = (weights(trainer), logged, evaluated)
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    # Both are done; leave without tearing down gloo's threads, which now and then wait for each other at exit.
    torch.distributed.barrier()
    os._exit(0)


def _trainer(name: str, folder: str, **extra):
    # 11 examples of uneven length: the last micro-batch of one rank is empty.
    items = items_for(objective_of(name), 11, seed=5)
    return trainer_for(name, folder, items=items, accumulate=2, ddp_find_unused_parameters=False, **extra)


def _together(port: int, folder: str) -> None:
    """Two processes, which end by the deadline or are ended."""
    ranks = mp.start_processes(_rank, (port, folder), nprocs=2, join=False, start_method="spawn")
    end = time.monotonic() + DEADLINE
    try:
        while not ranks.join(timeout=1):
            if time.monotonic() > end:
                pytest.fail(f"two ranks were not done after {DEADLINE} s; where they waited is on stderr")
    finally:
        for process in ranks.processes:
            if process.is_alive():
                process.kill()


def test_two_ranks_equal_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    _together(port, str(tmp_path))
    results = torch.load(tmp_path / "results.pt")
    for name in OBJECTIVES:
        alone = _trainer(name, f"{tmp_path}/alone-{name}", batch=2)
        alone.train()
        alone.accuracy = True
        evaluated = alone.evaluate()
        two_weights, two_losses, two_eval = results[name]
        assert furthest(weights(alone), two_weights) < 2e-7, name
        losses = [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
        assert torch.allclose(torch.tensor(losses), torch.tensor(two_losses), atol=1e-6), name
        for measure in ("eval_loss", "eval_accuracy"):
            # A ratio of counts over both ranks, not a mean of the ranks' ratios.
            assert abs(evaluated[measure] - two_eval[measure]) < 1e-7, (name, measure)
