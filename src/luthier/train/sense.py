"""Training keys that do not go together, found before anything is loaded."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from luthier.core.kinds import is_true
from luthier.core.paths import is_file, is_folder, local
from luthier.train import fsdp_keys, zero_keys
from luthier.train.config import TrainConfig
from luthier.train.keys import training_keys

Complaint = tuple[tuple[str, ...], str]
"""(the keys it is about, the first is blamed; what is wrong and how to mend it)"""

MINIMUM = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "num_train_epochs": 0,
    "max_grad_norm": 0,
    "label_smoothing_factor": 0,
    "dataloader_num_workers": 0,
    "logging_steps": 0,
    "save_total_limit": 1,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "adam_epsilon": 0,
    "seed": 0,
    "data_seed": 0,
    "eval_delay": 0,
    "ddp_timeout": 1,
}

BELOW_ONE = ("label_smoothing_factor", "adam_beta1", "adam_beta2")

TRACKERS = ("azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "mlflow", "neptune",
            "swanlab", "tensorboard", "trackio", "wandb", "all", "none")  # fmt: skip
"""What `report_to` may name without transformers being asked, which takes seconds."""

WANTS_OPTIONS = ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay")
"""Values of `lr_scheduler_type` that do not work without `lr_scheduler_kwargs`."""
GIVEN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs")
"""What a scheduler is told by the Trainer."""


def complaints(training: Mapping[str, Any], train: TrainConfig) -> Iterator[Complaint]:
    """What is wrong among the training keys."""
    defaults = {name: key.default for name, key in training_keys().items()} | {"do_train": True}
    keys = defaults | dict(training)
    yield from _ranges(keys)
    yield from _precision(keys)
    yield from _best(keys)
    yield from _evaluations(keys, train)
    yield from _schedule(keys)
    yield from _trackers(keys["report_to"])
    yield from _files(keys)
    yield from _sharding(training)
    yield from _loader(keys)
    yield from _checkpointing(training, train)


def _ranges(keys: Mapping[str, Any]) -> Iterator[Complaint]:
    for name, least in MINIMUM.items():
        if keys[name] is not None and keys[name] < least:
            yield (name,), f"expected at least {least}, got {keys[name]!r}."
    for name in BELOW_ONE:
        if keys[name] >= 1:
            yield (name,), f"expected less than 1, got {keys[name]!r}."
    for strategy, steps in (("logging_strategy", "logging_steps"), ("save_strategy", "save_steps")):
        if keys[strategy] == "steps" and keys[steps] == 0:
            yield (steps, strategy), f"{strategy} is steps, so expected more than 0. {strategy}: no turns it off."
    for steps in ("logging_steps", "save_steps", "eval_steps", "warmup_steps"):
        if keys[steps] is not None and keys[steps] > 1 and keys[steps] != int(keys[steps]):
            yield (steps,), f"expected a whole number of steps, or a share of all steps below 1, got {keys[steps]!r}."


def _precision(keys: Mapping[str, Any]) -> Iterator[Complaint]:
    if keys["bf16"] and keys["fp16"]:
        yield ("fp16", "bf16"), "bf16 and fp16 are both true. Keep one; bf16 where the hardware has it."


def _best(keys: Mapping[str, Any]) -> Iterator[Complaint]:
    """load_best_model_at_end wants every saved checkpoint evaluated."""
    when, saved = keys["eval_strategy"], keys["save_strategy"]
    if not keys["load_best_model_at_end"] or saved == "best" or when == "no":
        return
    if when != saved:
        text = f"the best checkpoint must have been both evaluated and saved, but eval_strategy is {when}"
        yield ("load_best_model_at_end", "eval_strategy", "save_strategy"), f"{text} and save_strategy is {saved}."
    elif when == "steps":
        every = keys["eval_steps"] or keys["logging_steps"]
        ratio = keys["save_steps"] / every if every else 0
        if not every or abs(ratio - round(ratio)) > 1e-9 or round(ratio) < 1 or (every < 1) != (keys["save_steps"] < 1):
            text = f"expected save_steps ({keys['save_steps']:g}) to be a multiple of eval_steps ({every:g})"
            yield ("save_steps", "eval_steps", "load_best_model_at_end"), f"{text}, so that what is saved is evaluated."


def _evaluations(keys: Mapping[str, Any], train: TrainConfig) -> Iterator[Complaint]:
    wanting = {
        "early_stopping_steps": train.early_stopping_steps is not None,
        "load_best_model_at_end": keys["load_best_model_at_end"],
        "save_strategy": keys["save_strategy"] == "best",
        "lr_scheduler_type": keys["lr_scheduler_type"] in ("reduce_lr_on_plateau", "greedy"),
    }
    for name in (name for name, wants in wanting.items() if wants and keys["eval_strategy"] == "no"):
        yield (name, "eval_strategy"), "needs evaluations to go by. Set eval_strategy: steps or epoch."
    if not keys["do_train"] and not keys["do_eval"]:
        yield ("do_train", "do_eval"), "do_train is false and do_eval is not true: there is nothing to do."
    if keys["save_strategy"] == "best" and not keys["metric_for_best_model"] and not keys["load_best_model_at_end"]:
        yield ("save_strategy", "metric_for_best_model"), "best by what? Set metric_for_best_model, such as loss."
    if train.early_stopping_steps is not None and train.early_stopping_steps < 1:
        yield ("early_stopping_steps",), f"expected at least 1, got {train.early_stopping_steps}."


def _schedule(keys: Mapping[str, Any]) -> Iterator[Complaint]:
    """Options that the scheduler does not take, or lacks; transformers finds out when everything is loaded."""
    name, options = keys["lr_scheduler_type"], keys["lr_scheduler_kwargs"]
    about = ("lr_scheduler_kwargs", "lr_scheduler_type")
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except ValueError:
            options = None
        if not isinstance(options, dict):
            yield about, f"expected a mapping, such as {{num_cycles: 2}}, got {keys['lr_scheduler_kwargs']!r}."
            return
    if not options and name not in WANTS_OPTIONS:
        return
    import torch
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
    from transformers.trainer_utils import SchedulerType

    rate = keys["learning_rate"] if keys["learning_rate"] > 0 else 1.0
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    try:
        get_scheduler(name, optimiser, num_warmup_steps=0, num_training_steps=1, scheduler_specific_kwargs=options)
    except (TypeError, ValueError) as error:
        parts = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]).parameters
        takes = ", ".join(part for part in parts if part not in GIVEN)
        yield about, f"{name} does not work so: {error}.{f' Options of {name}: {takes}.' if takes else ''}"


def _trackers(report_to: str | list[str] | None) -> Iterator[Complaint]:
    named = [report_to] if isinstance(report_to, str) else report_to or []
    for name in (name for name in named if name not in TRACKERS):
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        if name not in INTEGRATION_TO_CALLBACK:
            near = get_close_matches(name, TRACKERS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            yield ("report_to",), f"there is no tracker {name!r}.{hint} There are: {', '.join(TRACKERS)}."


def _files(keys: Mapping[str, Any]) -> Iterator[Complaint]:
    resume = keys["resume_from_checkpoint"]
    if isinstance(resume, str) and resume.lower() not in ("true", "false") and not is_folder(local(resume)):
        yield ("resume_from_checkpoint",), f"there is no folder {resume}. Name a checkpoint-N folder, or write true."
    for name in ("deepspeed", "fsdp_config"):
        value = keys[name]
        if isinstance(value, str) and not value.lstrip().startswith("{") and not is_file(local(value)):
            yield (name,), f"there is no file {value}."


def _sharding(training: Mapping[str, Any]) -> Iterator[Complaint]:
    if training.get("deepspeed"):
        for key, text in zero_keys.mistakes(training["deepspeed"], training):
            yield (key, "deepspeed"), text
    elif is_true(os.environ.get("ACCELERATE_USE_DEEPSPEED", "")):
        yield (
            ("deepspeed",),
            "is not set, and `accelerate launch` was told to use DeepSpeed. Name DeepSpeed's file here.",
        )
    value = training.get("fsdp_config")
    if not value:
        return
    if not training.get("fsdp"):
        yield ("fsdp_config", "fsdp"), "has a meaning only with fsdp: true."
    for text in fsdp_keys.mistakes(value):
        yield ("fsdp_config",), text


def _loader(keys: Mapping[str, Any]) -> Iterator[Complaint]:
    for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
        if keys[name] and not keys["dataloader_num_workers"]:
            yield (name, "dataloader_num_workers"), "has a meaning only with dataloader_num_workers of 1 or more."


def _checkpointing(training: Mapping[str, Any], train: TrainConfig) -> Iterator[Complaint]:
    names = [name for name in ("activation_checkpointing", "gradient_checkpointing") if training.get(name) is not None]
    if len({training[name] for name in names}) > 1:
        yield tuple(names), "activation_checkpointing and gradient_checkpointing mean the same and differ. Keep one."
    off = train.disable_gradient_checkpointing
    if off is not None and any(training[name] is off for name in names):
        text = f"contradicts disable_gradient_checkpointing: {str(off).lower()}. Keep one of the two."
        yield (names[0], "disable_gradient_checkpointing"), text
