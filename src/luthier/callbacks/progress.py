"""Shows how a run goes: a bar on a terminal, one plain line per logging step anywhere else. To stderr, from rank 0."""

from __future__ import annotations

import atexit
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from transformers import TrainerCallback
from transformers.trainer_utils import has_length
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from luthier.train.runlog import Clock, clock_time

if TYPE_CHECKING:
    from luthier.run import Run

_HIDDEN = ("total_flos", "tokens", "grad_norm", "epoch", "loss", "learning_rate", "tokens_per_second")
_SUMMARY = "train_runtime"
_LOUD = ("luthier", "transformers", "accelerate", "datasets", "peft")
"""Loggers that hold the stderr of before the bar, and would write across it."""


class Display(ABC):
    """Where progress is shown."""

    @abstractmethod
    def show(self, step: int, total: int, facts: list[str], *, logged: bool) -> None:
        """A step is done; `logged` says that these facts are new. The first facts matter most."""

    @abstractmethod
    def evaluating(self, done: int, total: int | None) -> None:
        """So many batches of an evaluation are done."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Something worth a line that stays."""

    @abstractmethod
    def close(self) -> None:
        """Give the terminal back. May be called twice."""


class Lines(Display):
    """For files and pipes: a line whenever the loop logs."""

    def __init__(self, console: Console):
        self._console = console

    def show(self, step: int, total: int, facts: list[str], *, logged: bool) -> None:
        if logged:
            self.note(f"step {step}/{total} | " + " | ".join(facts))

    def evaluating(self, done: int, total: int | None) -> None:
        if done == 1:
            self.note("evaluating" + (f" {total} batches" if total else ""))

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        return None


BAR_WIDTH = 12
"""Columns; step, loss, time left and tokens/s fit beside it in a terminal of 80."""


class Bar(Display):
    """For terminals. While it is up, whatever others write to stderr appears above it."""

    def __init__(self, console: Console):
        self._console = console
        before = sys.stderr
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=BAR_WIDTH),
            TextColumn("{task.fields[facts]}", markup=False),
            console=console,
            refresh_per_second=4,
        )
        self._bars.start()
        self._training: TaskID | None = None
        self._evaluation: TaskID | None = None
        self._rerouted = [
            handler
            for name in _LOUD
            for handler in logging.getLogger(name).handlers
            if isinstance(handler, logging.StreamHandler) and handler.stream is before
        ]
        self._before = before
        for handler in self._rerouted:
            handler.setStream(sys.stderr)
        atexit.register(self.close)

    def show(self, step: int, total: int, facts: list[str], *, logged: bool) -> None:
        self._end_evaluation()
        room = self._console.width - len("training ") - BAR_WIDTH - 1
        text = f"{step}/{total}"
        for fact in facts:
            if len(text) + 2 + len(fact) > room:
                break
            text += "  " + fact
        if self._training is None:
            self._training = self._bars.add_task("training", total=total, facts=text)
        self._bars.update(self._training, total=total, completed=step, facts=text)

    def evaluating(self, done: int, total: int | None) -> None:
        if self._evaluation is None:
            self._evaluation = self._bars.add_task("evaluating", total=total, facts="")
        self._bars.update(self._evaluation, completed=done, facts=f"{done}/{total}" if total else str(done))

    def note(self, text: str) -> None:
        self._end_evaluation()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        atexit.unregister(self.close)
        self._end_evaluation()
        self._bars.stop()
        for handler in self._rerouted:
            handler.setStream(self._before)
        self._rerouted = []

    def _end_evaluation(self) -> None:
        if self._evaluation is not None:
            self._bars.remove_task(self._evaluation)
            self._evaluation = None
            self._bars.refresh()


class ProgressCallback(TrainerCallback):
    """Step, epoch, loss, learning rate, tokens/s and the time that is left."""

    def __init__(self, console: Console | None = None, *, bar: bool = True):
        self._console = console or Console(stderr=True)
        self._bar_wanted = bar
        self._display: Display | None = None
        self._training = False
        self._others = False
        self._clock = Clock()
        self._logs: dict[str, float] = {}
        self._batches = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.close()
        self._training = True
        self._logs = {}
        self._clock = Clock(state.global_step)
        self._open(state)
        self._show(state, logged=False)

    def on_step_end(self, args, state, control, **kwargs):
        self._show(state, logged=False)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._display is None or not logs or _SUMMARY in logs:
            return
        if any(name.startswith("eval_") for name in logs):
            self._display.note(f"step {state.global_step}: " + ", ".join(_measures(logs)))
            return
        self._logs |= {name: value for name, value in logs.items() if isinstance(value, int | float)}
        self._show(state, logged=True)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        self._open(state)
        self._batches += 1
        if self._display is not None:
            self._display.evaluating(self._batches, len(eval_dataloader) if has_length(eval_dataloader) else None)

    def on_evaluate(self, args, state, control, **kwargs):
        self._end_evaluation()

    def on_predict(self, args, state, control, **kwargs):
        self._end_evaluation()

    def on_save(self, args, state, control, **kwargs):
        # One that could not be written, or is still being written, is not there.
        if self._display is not None and (Path(args.output_dir) / f"checkpoint-{state.global_step}").is_dir():
            self._display.note(f"saved checkpoint-{state.global_step}")

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Give the terminal back; to be called when training ends with an exception. May be called twice."""
        if self._display is not None:
            self._display.close()
            if self._others:
                enable_progress_bar()
        self._display = None
        self._training = False

    def _open(self, state) -> None:
        if self._display is None and state.is_world_process_zero:
            # Saving a checkpoint would draw a bar of its own across ours.
            self._others = is_progress_bar_enabled()
            disable_progress_bar()
            live = self._bar_wanted and self._console.is_terminal and not self._console.is_dumb_terminal
            self._display = Bar(self._console) if live else Lines(self._console)

    def _end_evaluation(self) -> None:
        self._batches = 0
        if not self._training:
            self.close()

    def _show(self, state, *, logged: bool) -> None:
        if self._display is not None:
            self._display.show(state.global_step, state.max_steps, self._facts(state), logged=logged)

    def _facts(self, state) -> list[str]:
        """Most telling first, for a narrow terminal drops the last."""
        shown = {
            name: self._logs[name] for name in ("loss", "tokens_per_second", "learning_rate") if name in self._logs
        }
        written = {"loss": "loss {:.4f}", "tokens_per_second": "{:,.0f} tokens/s", "learning_rate": "lr {:.2e}"}
        facts = [written[name].format(value) for name, value in shown.items()]
        remaining = self._clock.remaining(state.global_step, state.max_steps)
        left = "" if remaining is None else f", {clock_time(remaining)} left"
        facts.insert(1, clock_time(self._clock.elapsed()) + left)
        if state.epoch is not None:
            facts.append(f"epoch {state.epoch:.2f}")
        return facts + _measures({k: v for k, v in self._logs.items() if k not in _HIDDEN})


def _measures(logs: Mapping[str, object]) -> list[str]:
    skipped = ("epoch", "_runtime", "_per_second", "_flos")
    return [
        f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in logs.items()
        if isinstance(value, int | float) and not name.endswith(skipped)
    ]


def wanted(run: Run) -> TrainerCallback | None:
    """Always; `disable_tqdm: true` asks for lines instead of a bar."""
    return ProgressCallback(bar=not run.training.get("disable_tqdm", False))
