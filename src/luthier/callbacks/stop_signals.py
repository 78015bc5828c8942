"""SIGTERM and Ctrl-C: the step in hand is finished, a checkpoint is saved, and training stops cleanly."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl

from luthier.core.log import get_logger
from luthier.train.loop_state import Postpones

if TYPE_CHECKING:
    from luthier.run import Run

_CAUGHT = (signal.SIGTERM, signal.SIGINT)
ASKED = "LUTHIER_STOP"
"""Environment variable: a file that a launcher writes the number of a signal to, where it cannot send the signal."""


class StopSignals(TrainerCallback, Postpones):
    """All ranks stop after the same step, whichever of them were signalled. A second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.stopped_by: signal.Signals | None = None
        """What ended the run early, if anything did; its number + 128 is the exit code people expect."""
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.close()
        self.stopped_by = self._received = None
        self.owes_evaluation = False
        # Python lets only the main thread install handlers; a run inside another one is its owner's to stop.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._catch) for number in _CAUGHT}

    def on_step_end(self, args, state, control, **kwargs):
        received = self._agree(args.device)
        if received is not None and state.global_step < state.max_steps:
            self.stopped_by = received
            again = "Start the same command again to go on from there."
            if args.save_only_model:
                again = "It holds weights alone (save_only_model): a run can begin from them, and not go on."
            get_logger("train").info(
                "%s: saving checkpoint-%d and stopping. %s", received.name, state.global_step, again
            )
            control.should_save = True
            control.should_training_stop = True
            self._postpone(control)
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped_by is None:
            return control
        if state.epoch == int(state.epoch):
            self._postpone(control)
        else:
            # The epoch goes on in the resumed run, and what belongs to its end comes then.
            control.should_evaluate = control.should_log = False
        control.should_save = False
        return control

    def _postpone(self, control: TrainerControl) -> None:
        """Whoever sent the signal may not wait for an evaluation: the resumed run begins with it."""
        self.owes_evaluation |= control.should_evaluate
        control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Put the handlers of before back; to be called when training ends with an exception. May be called twice."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            self.close()
            raise KeyboardInterrupt
        self._received = signal.Signals(number)
        again = " Press Ctrl-C again to stop at once, without saving." if number == signal.SIGINT else ""
        if os.environ.get("RANK", "0") == "0":
            # The signal may have come in the middle of a write to stderr, which Python's streams do not allow twice.
            os.write(2, f"\n{self._received.name}: stopping after this step.{again}\n".encode())

    def _agree(self, device: torch.device) -> signal.Signals | None:
        """The signal any rank received: were each to decide alone, the others would wait for it for ever."""
        number = int(self._received or _asked())
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            votes = torch.tensor([number], device=device)
            dist.all_reduce(votes, op=dist.ReduceOp.MAX)
            number = int(votes)
        return signal.Signals(number) if number else None


def _asked() -> int:
    """The signal that a launcher has left word of, 0 if there is none."""
    file = os.environ.get(ASKED)
    text = Path(file).read_text(encoding="utf-8") if file is not None and os.path.exists(file) else ""
    return int(text or 0)


def wanted(run: Run) -> TrainerCallback | None:
    """Always."""
    return StopSignals()
