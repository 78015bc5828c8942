"""`luthier train`: YAML to weights, in the order it happens."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import check, predictions
from luthier.assemble import (
    bundles,
    choose_optimiser,
    in_half,
    lay_out,
    load_base,
    load_data,
    make_policy,
    make_trainer,
    one_device_each,
    weights,
)
from luthier.commands import parse_command
from luthier.core import locks
from luthier.core import log as logging
from luthier.core.errors import CheckpointError, ConfigError
from luthier.core.registry import every
from luthier.run import Run, resolve

if TYPE_CHECKING:
    import transformers

    from luthier.train.trainer import Trainer

log = logging.get_logger("fit")

PATIENCE = 15.0
"""Seconds that what is left of a killed run has to end, before a run with the same folder gives up."""


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    output_dir: Path
    metrics: Mapping[str, float]
    stopped_by: int | None = None
    """The number of the signal that ended the run early, if one did."""


def fit(run: Run) -> Result:
    """Train (and evaluate) what `run` describes; everything it leaves behind lies in `output_dir`."""
    from luthier.train import config, report

    logging.quiet_libraries()
    if run.train.plot_loss:
        report.check_plotting()
    args = config.training_arguments(run.training, run.train)
    one_device_each(args)
    folder = Path(args.output_dir)
    _writable(folder)
    if not args.do_train or args.process_index:
        return _fit(run, args)
    with locks.alone(folder, patience=PATIENCE) as free:
        return _fit(run, args, free=free)


def _fit(run: Run, args: transformers.TrainingArguments, *, free: bool = True) -> Result:
    """free: no other run is training into the folder."""
    import transformers

    from luthier.model.adapt import adapt, count_parameters, sidecars
    from luthier.train import sharding

    going_on, args = _resume_from(run, args, free)
    device = sharding.join(args, trains_backbone=run.objective.trains_backbone)
    sharded = sharding.splits(args)
    optimiser = choose_optimiser(run, args) if args.do_train else None
    run.quant.check()
    transformers.set_seed(args.seed)

    tokenizer, data = load_data(run, seed=args.seed, trains=args.do_train)
    model = load_base(run, tokenizer, dtype=weights(run, args), device=device, seed=args.seed, sharded=sharded)
    model = adapt(
        model,
        run.adapter,
        run.adapter_keys,
        model_config=run.model,
        trainable=run.objective.trains_backbone,
        seed=args.seed,
        upcast=not in_half(run),
    )
    setup = make_policy(run, model, args)
    if sharded:
        sharding.settle(setup.reference, args)
    log.info("%s", count_parameters(model))

    feed = _feed(run, data, setup, tokenizer, args, going_on)
    trainer = make_trainer(
        run,
        feed.setup,
        args,
        tokenizer,
        sidecars=[_config_writer(run), *sidecars(model, run.adapter, run.model)],
        optimizer_cls_and_kwargs=optimiser,
        async_save=run.resume.async_save,
        skip_bad_steps=run.resume.skip_bad_steps,
        find_batch=bool(run.training.get("auto_find_batch_size")),
        estimate=_estimate(run, args, model),
        data_mark=feed.mark,
        train_dataset=feed.train,
        eval_dataset=feed.evaluation.get("", feed.evaluation or None),
        data_collator=feed.collator,
        callbacks=[callback for module in every("callbacks") if (callback := module.wanted(run)) is not None],
    )
    if sharded and run.train.verify_layout:
        trainer.add_callback(sharding.Late(feed.confirm))
    if run.reference.precompute_reference and feed.setup.reference is not None:
        _precompute(run, trainer)
    metrics = _train(run, trainer, None if going_on is None else str(going_on))
    return Result(Path(args.output_dir), metrics, _stopped_by(trainer))


@dataclass(frozen=True)
class _Feed:
    """What the Trainer is given to train on."""

    setup: Any
    train: Any
    evaluation: dict[str, Any]
    collator: Any
    mark: str
    """Of the data, which a run that goes on must meet again; empty for a stream."""
    confirm: Callable[[], None]
    """The first batch's check, for engines that take the model over later."""


def _feed(
    run: Run, data: Any, setup: Any, tokenizer: Any, args: transformers.TrainingArguments, going_on: Path | None
) -> _Feed:
    """Rows in the layout of the run, checked; hidden states of them where nothing but a head is trained."""
    from luthier.train import resume, sharding
    from luthier.train.rows import confirm

    packing = run.objective.packs if run.layout.packing is None else run.layout.packing
    packing = packing or run.layout.neat_packing
    laid_out = lay_out(
        run,
        # Of a stream, the first rows stand for all.
        bundles(run, data.train if data.stream is None else data.stream.sample(), packing=packing),
        setup,
        tokenizer,
        batch_size=args.per_device_train_batch_size,
        noisy=bool(args.neftune_noise_alpha),
        late=sharding.splits(args),
    )
    evaluation = {name: bundles(run, part) for name, part in data.eval.items()}
    train, collator = laid_out.train, laid_out.collator
    mark = "" if run.data.streaming else resume.data_mark(train)
    if going_on is not None:
        resume.check_data(going_on, mark, allow=run.resume.allow_config_change)
    if data.stream is not None:
        train = data.stream.laid_out(
            run.layout.cutoff_len if packing else None,
            shuffle=not run.train.disable_shuffling,
            seed=args.data_seed,
        )
    late = partial(confirm, laid_out, setup, args.per_device_train_batch_size, args.device)
    if not run.objective.trains_backbone:
        setup, train, evaluation, collator = _head_only(run, setup, train, evaluation, collator, args)
    return _Feed(setup, train, evaluation, collator, mark, late)


def _train(run: Run, trainer: Trainer, going_on: str | None) -> dict[str, float]:
    from luthier.callbacks.progress import ProgressCallback
    from luthier.callbacks.stop_signals import StopSignals
    from luthier.model.adapt import finish
    from luthier.train import report

    metrics: dict[str, float] = {}
    if trainer.args.do_train:
        try:
            outcome = trainer.train(resume_from_checkpoint=going_on)
        finally:
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback | StopSignals):
                    callback.close()
        metrics |= outcome.metrics
        if _stopped_by(trainer) is not None:
            if trainer.failed_save is not None:
                raise CheckpointError(f"{trainer.failed_save} What was trained since then is lost.")
            return metrics
        trainer.save_final()
        if trainer.is_world_process_zero():
            finish(run.adapter, run.adapter_keys, Path(trainer.args.output_dir))
        trainer.save_metrics("train", outcome.metrics)
        trainer.save_state()
    if trainer.eval_dataset is not None and (trainer.args.do_eval or not trainer.args.do_train):
        found = _evaluated_last(trainer) or trainer.evaluate()
        found = report.with_perplexity(found) if run.objective.perplexity else found
        trainer.save_metrics("eval", found)
        metrics |= found
    judges = bool(run.objective.report) and trainer.args.do_eval and trainer.eval_dataset is not None
    if trainer.args.do_predict or judges:
        written = predictions.write_predictions(trainer, trainer.eval_dataset, Path(trainer.args.output_dir))
        if judges and trainer.is_world_process_zero():
            found = predictions.report(written, run.objective)
            trainer.save_metrics("eval", {**metrics, **found})
            metrics |= found
    if trainer.is_world_process_zero() and trainer.args.do_train:
        folder = Path(trainer.args.output_dir)
        drawn = report.plot_loss(folder, trainer.state.log_history) if run.train.plot_loss else []
        command = f"luthier train {run.source.path or 'config.yaml'}"
        report.write_card(folder, run, metrics, finished=datetime.now().astimezone(), command=command)
        if run.train.plot_loss and not drawn:
            log.info(
                "plot_loss draws nothing: no measure was logged twice (logging_steps: %s).", trainer.args.logging_steps
            )
        log.info("Saved to %s%s", folder, "".join(f"\n  {picture}" for picture in drawn))
    return metrics


def _estimate(run: Run, args: transformers.TrainingArguments, model: Any) -> Callable[[int], str]:
    """What `luthier check` would have said of a micro-batch of so many tokens."""
    from luthier.train import memory

    half = args.bf16 or args.fp16 or run.train.pure_bf16
    element, twice = 2 if half else 4, memory.checkpointed(args)
    return lambda tokens: str(check.estimate(model, tokens=tokens, element=element, checkpointing=twice))


def _head_only(run: Run, setup: Any, train: Any, evaluation: dict[str, Any], collator: Any, args: Any) -> tuple:
    """The hidden states of all examples, computed once, and what trains the head on them without the model."""
    from luthier.train.features import Features

    # The model is gone before the first step, and with it what could be recomputed.
    args.gradient_checkpointing = False
    features = Features(setup, run.data, collator, args.per_device_train_batch_size)
    train = features(train, "the training examples")
    evaluation = {name: features(part, "the evaluation examples") for name, part in evaluation.items()}
    return features.head_only()[0], train, evaluation, features.head_only()[1]


def _precompute(run: Run, trainer: Trainer) -> None:
    """Ask the reference about every example now, and let go of it."""
    from luthier.train.precompute import Precompute

    asks = Precompute(trainer.setup, run.data, trainer.data_collator, trainer.args.per_device_train_batch_size)
    trainer.train_dataset = asks(trainer.train_dataset, "the training examples")
    if isinstance(trainer.eval_dataset, dict):
        trainer.eval_dataset = {name: asks(part, name) for name, part in trainer.eval_dataset.items()}
    elif trainer.eval_dataset is not None:
        trainer.eval_dataset = asks(trainer.eval_dataset, "the evaluation examples")
    trainer.data_collator = asks.carrying()
    trainer.setup.reference = None


def _evaluated_last(trainer: Trainer) -> dict[str, float] | None:
    """The metrics of an evaluation after the very last step, if there was one and its model was kept."""
    if trainer.args.load_best_model_at_end or not trainer.args.do_train:
        return None
    found: dict[str, float] = {}
    for entry in trainer.state.log_history:
        if entry["step"] == trainer.state.global_step:
            found |= {name: value for name, value in entry.items() if name.startswith("eval_")}
    return found or None


def _resume_from(
    run: Run, args: transformers.TrainingArguments, free: bool
) -> tuple[Path | None, transformers.TrainingArguments]:
    """The checkpoint to go on from, and the arguments with which its steps stay what they were."""
    from luthier.train import config, processes, resume, sharding

    processes.one_folder(args, sharded=sharding.splits(args))
    asked, allow = run.training.get("resume_from_checkpoint"), run.resume.allow_config_change
    found = resume.choose(args, asked=asked, overwrite=run.train.overwrite_output_dir, free=free)
    if found is None:
        return None, args
    adapter = (found / "adapter_config.json").is_file()
    resume.check_states(found, key="adapter_name_or_path" if adapter else "model_name_or_path", allow=allow)
    if changes := resume.same_step(found, args):
        args = config.training_arguments(run.training, run.train, **changes)
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    resume.check_config(found, run.to_yaml(), rows_per_step=rows, allow=allow)
    return found, args


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"output_dir: {folder} cannot be written ({error.strerror or error}). Give a folder you may write to."
        ) from error


def _config_writer(run: Run) -> Callable[[Path], None]:
    """Puts the config file as the user wrote it, and the resolved one, into every folder that is saved."""
    name = run.source.path.name if run.source.path is not None else "config.yaml"
    # A user's file may itself be called resolved_config.yaml when a run is repeated from it.
    resolved = "resolved_config.yaml" if name != "resolved_config.yaml" else "resolved_config.again.yaml"
    text = run.to_yaml()

    def write(folder: Path) -> None:
        (folder / name).write_text(run.source.text, encoding="utf-8")
        (folder / resolved).write_text(text, encoding="utf-8")

    return write


def _stopped_by(trainer: Trainer) -> int | None:
    from luthier.callbacks.stop_signals import StopSignals

    caught = [c.stopped_by for c in trainer.callback_handler.callbacks if isinstance(c, StopSignals)]
    return next((int(signal) for signal in caught if signal is not None), None)


def main(argv: Sequence[str]) -> int:
    """`luthier train CONFIG [key=value ...]`. Returns 128 + n if signal n stopped the run after a checkpoint."""
    command = parse_command(argv, "train")
    run = resolve(command.config, command.overrides, verb="train")
    run.announce(log)
    result = fit(run)
    return 0 if result.stopped_by is None else 128 + result.stopped_by
