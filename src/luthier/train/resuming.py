"""The part of the Trainer that goes on from a checkpoint: bitwise where the run would have been without the break."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_callback import ExportableState

from luthier.core.log import get_logger
from luthier.train import checkpoint, loop_state, trackers
from luthier.train.loop_state import LoopState, Postpones
from luthier.train.meter import Meter
from luthier.train.saving import Saving, whole
from luthier.train.streaming import StreamLoader

log = get_logger("train")

EPOCHS, STEPS_PER_EPOCH, MAX_STEPS = 0, 1, 6
"""Where they stand in what `set_initial_training_values` returns."""


class Resuming(Saving):
    """A Trainer that knows its place: in the data, in the log, in what callbacks count.

    data_mark: what the training data are, for `resume.check_data`.
    """

    def __init__(self, *, data_mark: str = "", **kwargs: Any):
        super().__init__(**kwargs)
        self.data_mark = data_mark
        self.meter = Meter()
        self.bad_in_a_row = 0
        """Steps skipped since the last good one."""
        self.fits: int | None = None
        """Most rows of a micro-batch that fit into memory, where that was found out."""
        self._resume: str | None = None
        self._to_pick_up: str | None = None
        self._epoch = self._micro_batches = 0
        self._streaming: StreamLoader | None = None
        """The loader of streamed data."""

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimiser step, over all processes."""
        return self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """As transformers' own; a checkpoint that is being written when training ends is waited for."""
        self._resume = self._to_pick_up = resume_from_checkpoint
        if resume_from_checkpoint:
            # That evaluation came before the first step of all, and is in the log.
            self.args.eval_on_start = False
            if self.args.process_index == 0:
                step = checkpoint.step_in(Path(resume_from_checkpoint))
                trackers.go_on(self.callback_handler.callbacks, Path(str(self.args.output_dir)), step)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self._settle(together=False)

    def _stored(self) -> LoopState | None:
        """What the checkpoint says of the loop."""
        if self._resume is None:
            return None
        return loop_state.load(self._resume, self.args.process_index, self.args.world_size)

    def _resized(self) -> LoopState | None:
        """The same, if its steps had another size than those of this run: then steps do not tell the place."""
        state = self._stored()
        return state if state is not None and state.rows_per_step != self.rows_per_step else None

    # Place in the data

    def set_initial_training_values(self, args, dataloader):
        """How many steps there are, with those that were taken counted as they were."""
        values = list(super().set_initial_training_values(args, dataloader))
        state = self._resized()
        if state is not None:
            taken = checkpoint.step_in(Path(str(self._resume)))
            begun = state.rows // self.rows_per_step
            if args.max_steps > 0:
                rest = args.max_steps - taken
                values[EPOCHS] = state.epoch + math.ceil((begun + rest) / values[STEPS_PER_EPOCH])
            else:
                values[MAX_STEPS] += taken - (state.epoch * values[STEPS_PER_EPOCH] + begun)
        return tuple(values)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        place = super()._init_training_state(*args, **kwargs)
        self._find_best()
        state = self._resized()
        if state is not None and not self.args.ignore_data_skip:
            # Whole steps of this run's size: at most one step's rows are seen again.
            place = state.epoch, state.rows // self.rows_per_step * self.args.gradient_accumulation_steps
        self._epoch, self._micro_batches = place
        stored = self._stored()
        if self._streaming is not None and stored is not None:
            # A stream finds its place by itself; this is only the count.
            self._micro_batches = stored.rows // (self._train_batch_size * self.args.world_size)
        return place

    def _find_best(self) -> None:
        """Look for the best checkpoint beside the one that is gone on with, where its folder has been moved."""
        if self._resume is None or self.state.best_model_checkpoint is not None or not self.state.best_global_step:
            return
        beside = Path(self._resume).with_name(f"{checkpoint.PREFIX}{self.state.best_global_step}")
        if (beside / checkpoint.STATE).is_file():
            log.info("The best checkpoint is %s: its folder has been moved.", beside)
            self.state.best_model_checkpoint = str(beside)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if kwargs["epoch"] != self._epoch:
            self._epoch, self._micro_batches = kwargs["epoch"], 0
        self._pick_up()
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            # The run was done when it was killed; transformers would take one step more.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step, counted."""
        samples, totals = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_batches += len(samples)
        return samples, totals

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._streaming is not None:
            # A stream is one long epoch, which transformers counts from where this process began.
            self.state.epoch = self.state.global_step / self.state.max_steps
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._pick_up()
        self._settle()
        if self._resume is not None and self.args.should_save:
            self._remove_spare(Path(self._resume))
        return super()._finalize_training(*args, **kwargs)

    def _remove_spare(self, last: Path) -> None:
        """Remove what a run that was killed after its very last checkpoint had no time to remove."""
        own = last.resolve().parent == Path(str(self.args.output_dir)).resolve()
        if own and self.state.global_step == self._initial_global_step:
            best = self.state.best_model_checkpoint
            checkpoint.rotate(last.parent, last, keep=self.args.save_total_limit, best=best)

    # Everything else

    def loop_state(self) -> LoopState:
        """What a resumed run needs to know of the loop."""
        ended = whole(self.state.epoch)
        trained = self._micro_batches * self._train_batch_size * self.args.world_size
        callbacks = self.callback_handler.callbacks
        return LoopState(
            world=self.args.world_size,
            rows_per_step=self.rows_per_step,
            epoch=self._epoch + ended,
            rows=0 if ended else trained,
            loss=float(self._tr_loss),
            total_loss=self._total_loss_scalar,
            logged_step=self._globalstep_last_logged,
            meter=self.meter.state(),
            bad_in_a_row=self.bad_in_a_row,
            fits=self.fits,
            owes_evaluation=any(c.owes_evaluation for c in callbacks if isinstance(c, Postpones)),
            stream=() if self._streaming is None else self._streaming.place,
            finished=self.stops_by_evaluation,
            data=self.data_mark,
        )

    def _pick_up(self) -> None:
        """Once, before the first step: random numbers, sums, callbacks, and an evaluation that is still owed."""
        folder, self._to_pick_up = self._to_pick_up, None
        if folder is None:
            return
        self._restore_numbers(Path(folder))
        state = self._stored()
        if state is None:
            return
        self._tr_loss += state.loss
        self._total_loss_scalar, self._globalstep_last_logged = state.total_loss, state.logged_step
        if state.meter:
            self.meter.restore(state.meter)
        self.bad_in_a_row, self.fits = state.bad_in_a_row, state.fits
        self._restore_callbacks()
        if state.owes_evaluation:
            better = self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
            if better and self.args.save_strategy == "best":
                self._save_checkpoint(self.model, None)
        self.control.should_training_stop |= state.finished

    def _restore_callbacks(self) -> None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                stored = self.state.stateful_callbacks.get(type(callback).__name__, {})
                for name, value in stored.get("attributes", {}).items():
                    setattr(callback, name, value)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: `_pick_up` did it before the first micro-batch was asked for, which may itself draw numbers."""

    def _restore_numbers(self, folder: Path) -> None:
        """The state of all random number generators."""
        super()._load_rng_state(str(folder))
        world, rank = self.args.world_size, self.args.process_index
        if not (folder / ("rng_state.pth" if world == 1 else f"rng_state_{rank}.pth")).is_file():
            # Another number of processes: any numbers do, as long as they are the same each time.
            seed = self.args.seed + 1_000_003 * (self.state.global_step + 1) + rank
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
