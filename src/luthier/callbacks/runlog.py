"""Writes `trainer_log.jsonl` while the run goes on; the file itself is `train/runlog.py`'s business."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import TrainerCallback

from luthier.train.runlog import Clock, RunLog

if TYPE_CHECKING:
    from luthier.run import Run

_SUMMARY = "train_runtime"
"""In the last log of a run, which repeats what `train_results.json` says."""


class RunLogCallback(TrainerCallback):
    """One line for everything the loop logs between the first and the last step, from rank 0."""

    def __init__(self) -> None:
        self._log: RunLog | None = None
        self._clock = Clock()

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._log = RunLog(args.output_dir, resumed_step=state.global_step)
            self._clock = Clock(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._log is None or not logs or _SUMMARY in logs:
            return
        entry = self._log.entry(logs, step=state.global_step, total=state.max_steps, clock=self._clock)
        self._log.append(entry)

    def on_train_end(self, args, state, control, **kwargs):
        self._log = None


def wanted(run: Run) -> TrainerCallback | None:
    """Always: every run leaves its log."""
    return RunLogCallback()
