"""The part of the Trainer that saves: checkpoints complete or absent, at once or beside training.

A checkpoint stands for everything that happened up to its step, evaluations and lines of the log included, so that
nothing is lost or done twice by going on from it (`resuming.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import ExportableState

from luthier.core import manifest
from luthier.core.errors import CheckpointError, ConfigError
from luthier.core.log import get_logger
from luthier.core.objective import Objective
from luthier.model import heads, renamed
from luthier.model.head_only import HeadOnly, HeadOnlySetup
from luthier.model.policy import PolicySetup
from luthier.train import checkpoint, runlog
from luthier.train.loop_state import LoopState
from luthier.train.sharding import Sharding
from luthier.train.writer import Writer, snapshot

log = get_logger("train")

Sidecar = Callable[[Path], None]
"""Writes something into a folder that is being saved: the config file, a head."""


@contextmanager
def _metric_is_there() -> Iterator[None]:
    """Turn what transformers raises where evaluation brings no such metric into words for the user."""
    try:
        yield
    except KeyError as error:
        words = str(error.args[0])
        if "`metric_for_best_model`" not in words:
            raise
        raise ConfigError(f"metric_for_best_model: {words[: words.index(']') + 1]}. Name one of these.") from error


class _EpochEnds(transformers.TrainerCallback):
    """Tells the end of an epoch from the end of its last step."""

    over = False

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.over = False

    def on_epoch_end(self, args, state, control, **kwargs):
        self.over = True


class Saving(Sharding):
    """A Trainer whose checkpoints survive being killed, full disks and damage.

    setup, objective: whose weights and head are saved. sidecars: called with every folder that is saved, checkpoint or
    final. async_save: write checkpoints beside training.
    """

    def __init__(
        self,
        *,
        setup: PolicySetup | HeadOnlySetup,
        objective: Objective,
        sidecars: Sequence[Sidecar] = (),
        async_save: bool = False,
        **kwargs: Any,
    ):
        super().__init__(model=setup.model, **kwargs)
        self.setup, self.objective, self.sidecars = setup, objective, tuple(sidecars)
        self.writer = Writer(background=async_save and not self.sharded)
        if async_save and self.sharded:
            log.warning("async_save has no effect: FSDP and DeepSpeed write their parts together, between two steps.")
        if self.args.save_only_model and self.args.do_train:
            log.warning(
                "save_only_model: checkpoints hold weights alone; a run that breaks off cannot go on from them."
            )
        self.failed_save: str | None = None
        """Why the newest checkpoint that should be there is not."""
        self._writing: Path | None = None
        self._told = False
        self._best_before: str | None = None
        self._after_step = self._save_at_epoch_end = False
        self.stops_by_evaluation = False
        """Whether an evaluation ended the run (early stopping)."""
        self._ends = _EpochEnds()
        self.add_callback(self._ends)
        self.prove_sharding()

    def loop_state(self) -> LoopState:
        """What a resumed run needs to know of the loop."""
        return LoopState(world=self.args.world_size)

    # When to save

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Logs, evaluates, saves. What falls on the last step of an epoch is saved when the epoch has ended too.

        The end of an epoch may log and evaluate on its own; a checkpoint from before it would lose that.
        """
        self._after_step = not self._ends.over
        if self._ends.over:
            self.control.should_save |= self._save_at_epoch_end
            self._save_at_epoch_end = False
        self._put_off()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._after_step = False

    @property
    def _epoch_ends(self) -> bool:
        """Whether the step that was just taken is the last of its epoch, or of all."""
        return self.control.should_epoch_stop or self.control.should_training_stop or whole(self.state.epoch)

    def _put_off(self) -> None:
        if self._after_step and self._epoch_ends and self.control.should_save:
            self._save_at_epoch_end, self.control.should_save = True, False

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        stopping = self.control.should_training_stop
        with _metric_is_there():
            metrics = super()._evaluate(*args, **kwargs)
        self.stops_by_evaluation |= self.control.should_training_stop and not stopping
        self._put_off()
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        with _metric_is_there():
            better = super()._determine_best_metric(metrics=metrics, trial=trial)
        if better and self._after_step and self._epoch_ends and self.args.save_strategy == "best":
            self._save_at_epoch_end = True
            return False
        return better

    # How to save

    def _save_checkpoint(self, model, trial) -> None:
        self._settle()
        final = Path(self.args.output_dir) / f"{checkpoint.PREFIX}{self.state.global_step}"
        staged = checkpoint.aside(final)
        self.store_flos()
        self._best_before = self.state.best_model_checkpoint
        if self.state.best_global_step:
            best = final.with_name(f"{checkpoint.PREFIX}{self.state.best_global_step}")
            if best == final or best.exists():
                self.state.best_model_checkpoint = str(best)
        self._writing, self._told = final, False
        error, rest = None, None
        try:
            rest = self._stage(staged)
        except Exception as caught:
            error = caught
        self.accelerator.wait_for_everyone()
        if self._any_rank(error is not None):
            return self._give_up(error)
        if rest is not None and self.args.should_save:
            self.writer.start(partial(self._finish, rest, staged, final, self.state.best_model_checkpoint))
        if not self.writer.background:
            self._settle()

    def _stage(self, staged: Path) -> Callable[[], None]:
        """Write what is small or takes all ranks; returns what writes the rest."""
        staged.mkdir(parents=True, exist_ok=True)
        args, jobs = self.args, []
        if self.sharded:
            self.save_model(str(staged), _internal_call=True)
            if self.in_parts:
                self._save_beside_parts(staged)
        elif args.should_save:
            self._save_words(staged)
            jobs.append(partial(self._save_weights, staged, *self._weights(copied=self.writer.background)))
        if not args.save_only_model:
            self._save_rng_state(str(staged))
            self.loop_state().save(staged, args.process_index)
            if self.sharded:
                self._save_optimizer_and_scheduler(str(staged))
                self._save_scaler(str(staged))
            elif args.should_save:
                jobs.append(partial(_save_tensors, staged, self._optimizer_states(copied=self.writer.background)))
        if args.should_save:
            self._save_state(staged)
        return lambda: [job() for job in jobs]

    def _finish(self, rest: Callable[[], None], staged: Path, final: Path, best: str | None) -> None:
        """Rank 0's part, perhaps beside training: no model, no optimiser, no collective may be touched here."""
        rest()
        log_file = final.parent / runlog.NAME
        if log_file.is_file():
            manifest.flush(log_file)
        checkpoint.publish(staged, final)
        checkpoint.rotate(final.parent, final, keep=self.args.save_total_limit, best=best)

    def _settle(self, *, together: bool = True) -> None:
        """Wait for the checkpoint that is being written, and say if it could not be.

        together: all ranks are here and agree on it; not so where an error is on its way up.
        """
        if self._writing is None:
            return
        error = self.writer.wait()
        if self._any_rank(error is not None) if together else error is not None:
            return self._give_up(error)
        final, self._writing, self.failed_save = self._writing, None, None
        if together:
            self.accelerator.wait_for_everyone()
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(final))

    def _give_up(self, error: BaseException | None) -> None:
        """A checkpoint could not be written: clean up and train on. Raises what is no fault of the disk."""
        assert self._writing is not None
        final, self._writing = self._writing, None
        if self.args.should_save:
            checkpoint.discard(checkpoint.aside(final))
        self.state.best_model_checkpoint = self._best_before
        self.failed_save = self._reason(error, final)
        if not self._told:
            log.warning("WARNING: %s Training goes on; the next save tries again.", self.failed_save)

    def _reason(self, error: BaseException | None, final: Path) -> str:
        if error is not None and not checkpoint.is_write_error(error):
            raise error
        why = "another process could not write its part" if error is None else error
        return checkpoint.in_words(why, f"checkpoint {checkpoint.step_of(final)}", final.parent)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step. Says first if a checkpoint could not be written since the last one."""
        error = self.writer.failure()
        if error is not None and self._writing is not None and not self._told:
            self._told = True
            reason = self._reason(error, self._writing)
            log.warning("WARNING: %s Training goes on; the next save tries again.", reason)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _any_rank(self, here: bool) -> bool:
        if self.args.world_size == 1:
            return here
        flag = torch.tensor(float(here), device=self.args.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def save_final(self) -> None:
        """Save the trained model into output_dir itself, or say clearly why that did not work."""
        folder = Path(self.args.output_dir)
        staged = checkpoint.aside(folder / "model")
        with checkpoint.guarded(staged, "the trained model"):
            self.save_model(str(staged))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoint.publish_into(staged, folder)
                heads.drop_others(folder, self.objective.head)

    # What is saved

    def _save_state(self, folder: Path) -> None:
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(folder / checkpoint.STATE))

    def _weights(self, *, copied: bool) -> tuple[dict[str, torch.Tensor], nn.Module | None]:
        """The model's state and its head. copied: later steps must not change them."""
        state = self.model.state_dict()
        if copied:
            # What is not trained stays as it is, and may be large.
            still = {name for name, p in self.model.named_parameters(remove_duplicate=False) if not p.requires_grad}
            moving = snapshot({name: value for name, value in state.items() if name not in still}, copy=True)
            state = {name: moving.get(name, value) for name, value in state.items()}
        return state, copy.deepcopy(self.setup.head) if copied else self.setup.head

    def _optimizer_states(self, *, copied: bool) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        states = {OPTIMIZER_NAME: self.optimizer, SCHEDULER_NAME: self.lr_scheduler}
        states |= {SCALER_NAME: scaler} if scaler is not None else {}
        return {name: snapshot(owner.state_dict(), copy=copied) for name, owner in states.items()}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A whole model in a folder; the hook that engines call with the weights they gathered."""
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            self._save_words(folder)
        self._save_weights(folder, self.model.state_dict() if state_dict is None else state_dict, self.setup.head)

    def _save_beside_parts(self, folder: Path) -> None:
        """What whole weights would bring along. All ranks must call it."""
        judgement = self.whole_head()
        if not self.args.should_save:
            return
        self._save_words(folder)
        self.describe_parts(folder)
        if judgement:
            heads.save_tensors(judgement, str(self.objective.head), folder, self._head_facts())
        elif self.objective.head is not None:
            heads.describe(self.objective.head, folder, self._head_facts())

    def _save_words(self, folder: Path) -> None:
        """Everything that is text: tokenizer, config files."""
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        for write in self.sidecars:
            write(folder)

    def _save_weights(self, folder: Path, state: dict[str, torch.Tensor], head: nn.Module | None) -> None:
        if not isinstance(self.model, HeadOnly):
            without = state if head is None else heads.without_head(self.model, state)
            self.accelerator.unwrap_model(self.model, keep_torch_compile=False).save_pretrained(
                str(folder), state_dict=without, is_main_process=self.args.should_save
            )
        if head is not None and self.objective.head is not None and self.args.should_save:
            heads.save(head, self.objective.head, folder, self._head_facts(), heads.part_of(state))

    def _head_facts(self) -> dict[str, Any]:
        facts = {"stage": self.objective_name, "hidden_size": self.model.config.get_text_config().hidden_size}
        return {**facts, **self.objective.facts(self.processing_class)}

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        loaded = isinstance(self.model, HeadOnly) or self._load_renamed(resume_from_checkpoint)
        if not loaded and not self._load_adapter(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_head(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        if wrong := manifest.damage(best, weights_only=True):
            raise CheckpointError(
                f"load_best_model_at_end: {best} is damaged: {wrong}. Put a copy of it in its place, or remove the "
                "folder to keep the model of the last step, and start the same command again."
            )
        if not isinstance(self.model, HeadOnly) and not self._load_renamed(self.state.best_model_checkpoint):
            super()._load_best_model()
        self._load_head(self.state.best_model_checkpoint)

    def _load_renamed(self, folder: str) -> bool:
        # Engines that shard write the names that the model has in memory.
        return not self.sharded and renamed.load(self.model, Path(folder))

    def _load_adapter(self, folder: str) -> bool:
        """transformers would put adapters in folders inside, such as pissa_init/, on the model too."""
        from peft import PeftModel

        if self.sharded or not isinstance(self.model, PeftModel):
            return False
        self.model.load_adapter(folder, self.model.active_adapter, is_trainable=True)
        return True

    def _load_head(self, folder: str) -> None:
        # Engines that shard keep the head with all other weights.
        if not self.sharded and self.setup.head is not None and self.objective.head is not None:
            heads.load(self.setup.head, self.objective.head, folder)

    @property
    def objective_name(self) -> str:
        """The file in objectives/ that the objective comes from."""
        return type(self.objective).__module__.rpartition(".")[2]


def whole(epoch: float | None) -> bool:
    """Whether an epoch has just ended; transformers counts them in fractions."""
    return epoch is not None and epoch == int(epoch)


def _save_tensors(folder: Path, states: dict[str, Any]) -> None:
    for name, state in states.items():
        torch.save(state, folder / name)
