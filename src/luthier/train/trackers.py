"""What trackers need to know of a run that goes on, so that their curves have neither gaps nor doubles."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

EVENTS = "events.out.tfevents.*"


def go_on(callbacks: Iterable[TrainerCallback], output_dir: Path, step: int) -> None:
    """Let TensorBoard write where it wrote before, and forget what it was told of steps after `step`.

    Otherwise it would show each start of the run as a run of its own, and steps that are taken again twice.
    """
    if importlib.util.find_spec("tensorboard") is None:
        return
    from torch.utils.tensorboard import SummaryWriter

    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            given = callback.logging_dir
            before = _last_written(output_dir / "runs" if given is None else Path(given))
            if before is not None:
                callback.tb_writer = SummaryWriter(log_dir=str(before), purge_step=step + 1)


def _last_written(folder: Path) -> Path | None:
    files = sorted(folder.rglob(EVENTS), key=lambda file: file.stat().st_mtime)
    return files[-1].parent if files else None
