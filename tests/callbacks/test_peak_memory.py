"""The line about memory at the end of a run."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import psutil
import torch

from luthier.callbacks.peak_memory import PeakMemory


def test_one_process_says_what_it_took(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("luthier"), "propagate", True)
    kept = torch.ones(40_000_000)  # 160 MB, so that the figure is one of this process
    args = SimpleNamespace(device=torch.device("cpu"), world_size=1)
    callback = PeakMemory()
    with caplog.at_level(logging.INFO, "luthier"):
        callback.on_train_begin(args, None, None)
        callback.on_train_end(args, None, None)
    said = caplog.messages[-1]
    assert said.startswith("Peak memory of the process: ") and said.endswith(" GiB") and "rank" not in said
    figure = float(said.split()[-2])
    now = psutil.Process().memory_info().rss / 2**30
    assert now - 0.01 <= figure < now + 8, (figure, now, len(kept))
