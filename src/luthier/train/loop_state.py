"""What only the loop knows and a checkpoint needs besides weights, optimiser and random numbers; one file a rank.

Without it a resumed run would log other means, count tokens from zero, evaluate too often or too seldom, and lose its
place in the data when the number of processes changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

_NAME = "loop_state_{}.json"


class Postpones:
    """A callback that stops a run before an evaluation that was due; the resumed run begins with it."""

    owes_evaluation: bool = False


@dataclass(frozen=True)
class LoopState:
    """Of one rank, after a step."""

    world: int = 1
    """Processes."""
    rows_per_step: int = 1
    """Rows (examples, or packed rows) of an optimiser step over all processes."""
    epoch: int = 0
    """The epoch the next step belongs to."""
    rows: int = 0
    """Rows of that epoch that were trained, over all processes."""
    loss: float = 0.0
    """Losses since the last line of the log, summed."""
    total_loss: float = 0.0
    """Losses up to the last line of the log, summed."""
    logged_step: int = 0
    """The step of that line."""
    meter: Mapping[str, Any] = field(default_factory=dict)
    """`Meter.state()`."""
    bad_in_a_row: int = 0
    """Steps skipped since the last good one."""
    fits: int | None = None
    """Most rows of a micro-batch that fit into memory, where that was found out."""
    owes_evaluation: bool = False
    """The run was stopped before an evaluation that was due."""
    stream: tuple[int, ...] = ()
    """Of streamed data, where this rank's next micro-batch begins: chunk, and bundle in it."""
    finished: bool = False
    """What was evaluated ended the run (early stopping)."""
    data: str = ""
    """`resume.data_mark` of the training rows; "" where they are read on the way."""

    def save(self, folder: Path, rank: int) -> None:
        """Write one rank's file."""
        (folder / _NAME.format(rank)).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def first(folder: str | Path) -> LoopState | None:
    """Rank 0's; None for a checkpoint of another tool."""
    return _read(folder, 0)


def load(folder: str | Path, rank: int, world: int) -> LoopState | None:
    """What rank `rank` of `world` goes on from; None for a checkpoint of another tool.

    Where the number of processes changed, rank 0 takes over what was summed, and losses (which are averaged over the
    processes) are shared out.
    """
    zero = first(folder)
    if zero is None or zero.world == world:
        return zero if rank == 0 else _read(folder, rank) or zero
    old = [_read(folder, other) or zero for other in range(zero.world)]
    meter = dict(zero.meter)
    if meter:
        names = {name for state in old for name in state.meter["sums"]}
        sums = {name: sum(state.meter["sums"].get(name, 0.0) for state in old) for name in sorted(names)}
        meter["sums"] = sums if rank == 0 else dict.fromkeys(sums, 0.0)
    mean = sum(state.loss for state in old) / len(old)
    return replace(zero, loss=mean, meter=meter, fits=None)


def _read(folder: str | Path, rank: int) -> LoopState | None:
    file = Path(folder) / _NAME.format(rank)
    return LoopState(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
