"""The part of the Trainer for steps that cannot be computed: numbers that are not finite, memory that runs out."""

from __future__ import annotations

import contextlib
import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from luthier.core.batch import Batch
from luthier.core.errors import LuthierError, TrainingError
from luthier.core.log import get_logger
from luthier.train import bad_batch, checkpoint, finite, memory
from luthier.train.resuming import Resuming

log = get_logger("train")

Estimate = Callable[[int], str]
"""What a micro-batch of so many tokens should need, in words."""


class Guarding(Resuming, ABC):
    """A Trainer that says what went wrong with which rows, leaves bad steps out and finds out what fits.

    skip_bad_steps: how many steps in a row may be left out. find_batch: compute a micro-batch that does not fit into
    memory in smaller parts; the optimiser step stays the same. estimate: for the message where nothing helps.
    """

    def __init__(
        self, *, skip_bad_steps: int = 0, find_batch: bool = False, estimate: Estimate | None = None, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.skip_bad_steps, self.find_batch, self.estimate = skip_bad_steps, find_batch, estimate
        self._inputs: list[dict[str, Any]] = []
        self._current = self._last = -1
        self._bad: dict[int, Tensor] = {}
        self._loss_before = 0.0
        self._totals: Any = None
        self._progress = 0.0

    @abstractmethod
    def ask(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch and what it measures; asked once more where it was not finite."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own; memory that runs out anywhere gets a message."""
        try:
            return super().train(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, LuthierError) or not memory.exhausted(error):
                raise
            text = memory.message(f"at step {self.state.global_step + 1}", None, 0, self.args, estimate="")
            raise TrainingError(
                f"{text} It was no forward or backward pass; the optimiser, an evaluation (per_device_eval_batch_size) "
                f"or a survey wanted more: {error}"
            ) from error

    def begin_step(self, samples: Sequence[dict[str, Any]]) -> None:
        """Remember a step's micro-batches until the next one."""
        self._inputs, self._bad = list(samples), {}
        self._current = self._last = -1
        self._loss_before = float(self._tr_loss) if self.skip_bad_steps else 0.0

    def saw(self, loss: Tensor, totals: Any, progress: float) -> None:
        """Note whether the loss of the micro-batch at hand is finite; looked at once a step."""
        self._totals, self._progress = totals, progress
        bad = ~torch.isfinite(loss.detach())
        self._bad[self._current] = self._bad.get(self._current, bad) | bad

    # Memory

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Forward and backward of a micro-batch, in as many parts as memory asks for."""
        self._last += 1
        self._current = self._last
        if not self.find_batch:
            loss, error = self._try(model, [inputs], num_items_in_batch)
            if error is not None:
                raise TrainingError(self._too_large(inputs)) from error
            return loss
        with self._alone(model):
            loss, error = self._try(model, self._parts(inputs), num_items_in_batch)
            while error is not None:
                self._halve(error)
                del error
                loss, error = self._again(model, num_items_in_batch)
        self._average(model)
        return loss

    def _try(self, model, parts: Sequence[Mapping[str, Any]], totals: Any) -> tuple[Tensor, BaseException | None]:
        loss = torch.zeros((), device=self.args.device)
        try:
            for part in parts:
                loss = loss + super().training_step(model, part, totals)
        except (RuntimeError, MemoryError) as error:
            if not memory.exhausted(error):
                raise
            # The frames it came through hold the tensors that did not fit.
            return loss, error.with_traceback(None)
        return loss, None

    def _again(self, model, totals: Any) -> tuple[Tensor, BaseException | None]:
        """The step from its beginning: the backward pass that failed has left half a gradient.

        Where memory runs out once more, `_current` is the micro-batch it was.
        """
        gc.collect()
        clear_device_cache()
        model.zero_grad()
        self.meter.again()
        self._current = -1
        for inputs in self._inputs[: self._last + 1]:
            self._current += 1
            loss, error = self._try(model, self._parts(inputs), totals)
            if error is not None:
                break
        return loss, error

    def _parts(self, inputs: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        rows = inputs["rows"].bundles
        if self.fits is None or len(rows) <= self.fits:
            return [inputs]
        return [self.data_collator(rows[i : i + self.fits]) for i in range(0, len(rows), self.fits)]

    def _halve(self, error: BaseException) -> None:
        inputs = self._inputs[self._current]
        tried = min(len(inputs["rows"].bundles), self.fits or len(inputs["rows"].bundles))
        if tried <= 1:
            raise TrainingError(self._too_large(inputs)) from error
        self.fits = tried // 2
        log.warning(
            "WARNING: %d rows at once do not fit into memory. They are computed %d at a time from here on; the "
            "optimiser step stays the same.",
            tried,
            self.fits,
        )

    def _too_large(self, inputs: Mapping[str, Any]) -> str:
        batch: Batch = inputs["batch"]
        estimate = self.estimate(batch.ids.numel()) if self.estimate is not None else ""
        what = f"at step {self.state.global_step + 1}"
        return memory.message(
            what, batch, len(inputs["rows"].bundles), self.args, estimate=estimate, finds=self.find_batch
        )

    def _alone(self, model):
        """Processes that may begin a step again must not meet the others in the middle of it."""
        return self.accelerator.no_sync(model) if self.args.world_size > 1 else contextlib.nullcontext()

    def _average(self, model) -> None:
        """The mean of the gradients over the processes, when the step's last micro-batch is done."""
        if self.args.world_size == 1 or not self.accelerator.sync_gradients:
            return
        for parameter in model.parameters():
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self.args.world_size

    # Numbers that are not finite

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # fp16 scaling makes infinite gradients on purpose, and leaves those steps out itself.
        gradient = self.accelerator.scaler is None and norm is not None and not bool(torch.isfinite(_tensor(norm)))
        losses = any(bool(flag) for flag in self._bad.values())
        if not self._any_rank(gradient or losses):
            self.bad_in_a_row = 0
            return norm
        # A loss that is not finite on one process spoils the gradient of all.
        innocent = self._any_rank(losses) and not losses
        said = self._everybody("" if innocent else self._explain(norm))
        self._leave_out(said or f"The gradient norm is {float(norm)} at step {self.state.global_step + 1}.")
        return norm

    def _leave_out(self, what: str) -> None:
        """Stop here, or go on as if the step had not been."""
        self.bad_in_a_row += 1
        if self.bad_in_a_row > self.skip_bad_steps:
            many = f" It is number {self.bad_in_a_row} in a row." if self.skip_bad_steps else ""
            kept = checkpoint.complete(self.args.output_dir)
            intact = f"The last complete checkpoint is {kept[-1]}." if kept else "No checkpoint was written yet."
            raise TrainingError(
                f"{what}{many} {intact} Lower learning_rate, train in float32 or bf16, look at the rows, or leave out "
                "up to N such steps in a row with skip_bad_steps: N."
            )
        log.warning("WARNING: %s The step is left out.", what)
        if self.accelerator.scaler is None:  # else the scaler leaves the step out
            # What accelerate's optimiser asks before it steps. Gradients of None would not do: some optimisers count
            # the step all the same, and some insist on gradients.
            self.accelerator.gradient_state._set_sync_gradients(False)
        self.meter.drop()
        self._tr_loss.fill_(self._loss_before)

    def _explain(self, norm: Any) -> str:
        """What is wrong on this process, with the batch kept in a file; "" if nothing is."""
        wrong = [number for number, flag in self._bad.items() if bool(flag)]
        step = self.state.global_step + 1
        what = (
            f"The loss is not finite at step {step}" if wrong else f"The gradient norm is {float(norm)} at step {step}"
        )
        found = self._search(wrong[:1], loss=True) if wrong else self._search(range(len(self._inputs)))
        if found is None and self.args.world_size > 1:
            return ""
        numbers = wrong or (range(len(self._inputs)) if found is None else [found[0]])
        chosen = {number: self._inputs[number] for number in numbers}
        rows = [name for inputs in chosen.values() for name in inputs["batch"].names]
        where = "A second pass over the same rows was finite; random numbers matter." if found is None else found[1]
        return f"{what}; the rows in the batch were {memory.some(rows)}. {where} {self._keep(step, what, chosen)}."

    def _search(self, numbers: Sequence[int], *, loss: bool = False) -> tuple[int, str] | None:
        """The first of these micro-batches that is not finite again, and where it begins to be so."""
        if self.sharded:
            return numbers[0], "Where it began was not looked for: that takes all processes at once."
        try:
            for number in numbers:
                if where := self._where(self._inputs[number]["batch"], loss):
                    return number, where
        except RuntimeError as error:
            return numbers[0], f"Where it began was not found: {error}."
        return None

    def _where(self, batch: Batch, loss: bool) -> str | None:
        batch = batch.to(self.args.device).with_totals(self._totals, self._progress)
        module = finite.first_module(self.model, lambda: self.ask(self.model, batch))
        if module is not None:
            return f"The first module with an output that is not finite is {module}."
        if loss:
            return f"Every module's output is finite; it is the loss of stage {self.objective_name} that is not."
        weight = finite.first_gradient(self.model, lambda: self.ask(self.model, batch)[0])
        return None if weight is None else f"The first gradient that is not finite, on the way back, is {weight}."

    def _keep(self, step: int, what: str, chosen: Mapping[int, Mapping[str, Any]]) -> str:
        rank = f"-rank-{self.args.process_index}" if self.args.world_size > 1 else ""
        file = Path(self.args.output_dir) / f"bad_step-{step}{rank}.jsonl"
        tokenizer = self.processing_class.name_or_path if self.processing_class is not None else ""
        header = {
            "step": step,
            "what": what,
            "tokenizer": tokenizer,
            "columns": [column.name for column in self.objective.columns],
        }
        try:
            bad_batch.write(file, header, {number: inputs["rows"].bundles for number, inputs in chosen.items()})
        except OSError as error:
            return f"The batch could not be kept in {file}: {error}."
        return f"To see the batch: luthier preview {file}"

    def _everybody(self, text: str) -> str:
        """What all processes say, each that has something to say."""
        if self.args.world_size == 1:
            return text
        texts: list[Any] = [None] * self.args.world_size
        torch.distributed.all_gather_object(texts, text)
        return "\n".join(f"rank {rank}: {said}" for rank, said in enumerate(texts) if said)


def _tensor(number: Any) -> Tensor:
    return torch.as_tensor(number)
