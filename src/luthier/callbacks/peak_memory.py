"""Says at the end of a run how much memory each process needed at most, on its device or in the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from luthier.core.log import get_logger
from luthier.train.memory import peak

if TYPE_CHECKING:
    from luthier.run import Run

_GIB = 2**30


class PeakMemory(TrainerCallback):
    """One line from rank 0, with a figure for each rank: the one that needs most decides what fits."""

    def on_train_begin(self, args, state, control, **kwargs):
        if args.device.type != "cpu":
            torch.get_device_module(args.device).reset_peak_memory_stats(args.device)

    def on_train_end(self, args, state, control, **kwargs):
        peaks = gathered(peak(args.device), args)
        where = "of the process" if args.device.type == "cpu" else f"on {args.device.type}"
        shown = ", ".join(f"rank {rank} {value / _GIB:.2f} GiB" for rank, value in enumerate(peaks))
        one = f"{peaks[0] / _GIB:.2f} GiB"
        get_logger("train").info("Peak memory %s: %s", where, shown if len(peaks) > 1 else one)


def gathered(value: float, args) -> list[float]:
    """A number of every rank, by rank."""
    if args.world_size == 1:
        return [value]
    own = torch.tensor([value], dtype=torch.float64, device=args.device)
    everybody = [torch.zeros_like(own) for _ in range(args.world_size)]
    dist.all_gather(everybody, own)
    return [float(each) for each in everybody]


def wanted(run: Run) -> TrainerCallback | None:
    """Always."""
    return PeakMemory()
