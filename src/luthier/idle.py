"""Keys that make sense and will still change nothing in this run: whoever wrote one is told, and told why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from luthier.rules import TRAINS, Keys
from luthier.train.config import trains

NO_WARM_UP = ("constant", "reduce_lr_on_plateau", "greedy")
"""Schedules that transformers gives no warm-up."""
NO_OPTIONS = ("constant", "constant_with_warmup")
"""Schedules that transformers gives no lr_scheduler_kwargs."""
UNSMOOTHED = ("dpo", "kto", "rm", "disco_rm", "accept_head")
"""Stages whose loss is no cross-entropy over the vocabulary."""


@dataclass(frozen=True)
class Idle:
    """Keys that change nothing under a condition. A name that ends in * means all keys that begin so."""

    keys: tuple[str, ...]
    when: Callable[[Keys], Any]
    why: str
    """`{key}` is a key's value."""
    verbs: tuple[str, ...] = TRAINS
    """Where it is said; () everywhere."""


def _evaluates(k: Keys) -> bool:
    asked = any(k[key] for key in ("do_eval", "do_predict", "eval_on_start"))
    return asked or k["eval_strategy"] != "no" or not trains(k)


def _reports_to(k: Keys, *trackers: str) -> bool:
    """Whether any of these trackers is told, or any at all."""
    given = k["report_to"]
    named = {given} if isinstance(given, str) else set(given or ())
    return bool("all" in named or named.intersection(trackers) or (not trackers and named - {"none"}))


TABLE: tuple[Idle, ...] = (
    # evaluation, checkpoints, logging
    Idle(("eval_dataset",), lambda k: not _evaluates(k), "nothing evaluates it; set eval_strategy: steps or epoch"),
    Idle(("per_device_eval_batch_size", "eval_on_each_dataset", "metric_for_best_model", "greater_is_better"),
         lambda k: not _evaluates(k), "nothing is evaluated; set eval_strategy: steps or epoch"),
    Idle(("eval_steps", "eval_delay"), lambda k: k["eval_strategy"] == "no",
         "nothing is evaluated while training; set eval_strategy: steps"),
    Idle(("eval_steps",), lambda k: k["eval_strategy"] == "epoch", "eval_strategy is epoch"),
    Idle(("save_steps",), lambda k: k["save_strategy"] != "steps", "save_strategy is {save_strategy}"),
    Idle(("save_total_limit",), lambda k: k["save_strategy"] == "no", "save_strategy is no"),
    Idle(("logging_steps",), lambda k: k["logging_strategy"] != "steps"
         and (k["eval_strategy"] != "steps" or k["eval_steps"]), "logging_strategy is {logging_strategy}"),
    Idle(("run_name",), lambda k: not _reports_to(k), "report_to names no tracker"),
    Idle(("logging_dir",), lambda k: not _reports_to(k, "tensorboard"), "report_to does not name tensorboard"),
    Idle(("project", "trackio_*"), lambda k: not _reports_to(k, "trackio"), "report_to does not name trackio"),
    # schedule and loss
    Idle(("warmup_steps",), lambda k: k["lr_scheduler_type"] in NO_WARM_UP
         and not str(k["optim"]).startswith("schedule_free"),
         "lr_scheduler_type: {lr_scheduler_type} has no warm-up; constant_with_warmup has one"),
    Idle(("lr_scheduler_kwargs",), lambda k: k["lr_scheduler_type"] in NO_OPTIONS,
         "lr_scheduler_type: {lr_scheduler_type} has no options"),
    Idle(("label_smoothing_factor",), lambda k: k["stage"] in UNSMOOTHED,
         "the loss of stage {stage} is no cross-entropy over the vocabulary"),
    # data, model, adapters
    Idle(("mix_strategy",), lambda k: k.count("dataset") == 1, "there is one data set"),
    Idle(("adapter_folder",), lambda k: not k["adapter_name_or_path"], "adapter_name_or_path is not set", ()),
    Idle(("additional_target",), lambda k: k["finetuning_type"] == "full",
         "finetuning_type: full trains everything"),
    Idle(("quantization_type", "double_quantization"),
         lambda k: k["quantization_bit"] != 4 or k["quantization_method"] not in ("bnb", "bitsandbytes"),
         "it is for quantization_bit: 4 of bnb", ()),
    Idle(("pissa_iter",), lambda k: not k["pissa_init"], "pissa_init is not set"),
    # optimisers, kernels
    *(Idle((f"{name}_*",), lambda k, name=name: not k[f"use_{name}"], f"use_{name} is not set")
      for name in ("galore", "apollo", "badam")),
    Idle(("loraplus_lr_embedding",), lambda k: k["loraplus_lr_ratio"] is None, "loraplus_lr_ratio is not set"),
    Idle(("optim_target_modules",), lambda k: not str(k["optim"]).startswith(("galore", "apollo")),
         "it is for optim: galore_... and apollo_..., and optim is {optim}"),
    Idle(("liger_kernel_config",), lambda k: not k["use_liger_kernel"], "use_liger_kernel is not set"),
)  # fmt: skip


def idle(keys: Keys, defaults: Mapping[str, Any], verb: str) -> Iterator[str]:
    """A line for each reason why something that is set, and not to its default, changes nothing.

    keys: what every key comes to. defaults: of the keys that the parts of this run own; no others are looked at.
    """
    for row in TABLE:
        if (row.verbs and verb not in row.verbs) or not row.when(keys):
            continue
        names = [name for key in row.keys for name in _named(key, defaults) if keys[name] != defaults[name]]
        if names:
            said = f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} no effect"
            yield f"{said}: {row.why.format_map(keys)}."


def _named(key: str, defaults: Mapping[str, Any]) -> list[str]:
    start, star, _ = key.partition("*")
    return [name for name in defaults if name.startswith(start)] if star else [key] if key in defaults else []
