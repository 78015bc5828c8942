"""What a worker of `luthier train --ray` does, and the files in `output_dir/ray` through which it and the driver talk.

A worker leaves word of what no restart can mend, and the driver of a signal that asks the run to stop.
"""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier import ranks
from luthier.core.errors import ConfigError, mendable
from luthier.core.log import set_up
from luthier.fit import fit
from luthier.run import resolve
from luthier.train.resume import STARTED

REFUSED = "refused"
"""Folder with a file for each worker that left word: an exit code, and below it what to say."""
STOP = "stop"
"""File with the number of a signal."""


def work(settings: Mapping[str, Any]) -> int | None:
    """What each worker does; returns the signal that stopped it. Ray has put its rank into the environment."""
    set_up()
    from luthier.callbacks.stop_signals import ASKED

    folder = Path(settings["folder"])
    if Path(settings["cwd"]).is_dir():
        os.chdir(settings["cwd"])
    # A checkpoint that is younger than the run was written by an attempt before this one.
    os.environ |= {STARTED: str(settings["started"]), "TORCHELASTIC_RESTART_COUNT": "1", ASKED: str(folder / STOP)}
    try:
        return fit(resolve(settings["config"], settings["overrides"], verb="train")).stopped_by
    except Exception as error:
        code, text = _verdict(error)
        if code is not None:
            _refuse(folder, code, text)  # The driver ends the run when it reads that.
        elif not refusals(folder):
            raise
    return None


def _verdict(error: Exception) -> tuple[int | None, str]:
    """Exit code and words for what would come again after a restart; None for what a restart may mend."""
    if (text := mendable(error)) is not None:
        return 2, f"error: {text}"
    if isinstance(error, RuntimeError | OSError):  # of CUDA, NCCL, gloo, a network's file system
        return None, ""
    return 1, f"rank {ranks.rank()}:\n{''.join(traceback.format_exception(error))}"


def _refuse(folder: Path, code: int, text: str) -> None:
    """Leave word for the driver; it appears as a whole."""
    unfinished = folder / REFUSED / f".{ranks.rank()}"
    unfinished.write_text(f"{code}\n{text}", encoding="utf-8")
    unfinished.rename(folder / REFUSED / f"{ranks.rank()}.txt")


def refusals(folder: Path) -> list[Path]:
    """What workers left word of, the first one first."""
    return sorted((folder / REFUSED).glob("[0-9]*.txt"), key=lambda file: file.stat().st_mtime_ns)


def clear(folder: Path) -> None:
    """Forget what an earlier run left."""
    shutil.rmtree(folder / REFUSED, ignore_errors=True)
    (folder / STOP).unlink(missing_ok=True)
    try:
        (folder / REFUSED).mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"output_dir: {folder} cannot be written ({error.strerror}).") from error
