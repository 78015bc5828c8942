"""Which optimiser a run trains with: a rule of `optim/`, or what `optim` names in transformers."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError
from luthier.core.log import get_logger
from luthier.core.registry import find
from luthier.optim._task import Task
from luthier.train import low_rank_names

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

log = get_logger("train")

PACKAGES: tuple[tuple[str, str, str], ...] = (
    ("galore_", "galore_torch", "galore-torch"),
    ("apollo_", "apollo_torch", "apollo-torch"),
    ("lomo", "lomo_optim", "lomo-optim"),
    ("adalomo", "lomo_optim", "lomo-optim"),
    ("grokadamw", "grokadamw", "grokadamw"),
    ("schedule_free_", "schedulefree", "schedulefree"),
    ("stable_adamw", "optimi", "torch-optimi"),
    ("adamw_torch_4bit", "torchao", "torchao"),
    ("adamw_torch_8bit", "torchao", "torchao"),
    ("adamw_torch_xla", "torch_xla", "torch_xla"),
    ("adamw_torch_npu", "torch_npu", "torch_npu"),
    ("adamw_anyprecision", "torchdistx", "torchdistx"),
    ("adamw_8bit", "bitsandbytes", "luthier[quant]"),
    ("adamw_bnb", "bitsandbytes", "luthier[quant]"),
    ("ademamix", "bitsandbytes", "luthier[quant]"),
    ("lion_", "bitsandbytes", "luthier[quant]"),
    ("paged_", "bitsandbytes", "luthier[quant]"),
    ("rmsprop_bnb", "bitsandbytes", "luthier[quant]"),
)
"""What names of `optim` need: how they begin, the import name, what to ask pip for."""

ADAM: dict[str, float] = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
"""Keys that not every optimiser reads, with their defaults."""

CUDA_ONLY = ("adalomo", "galore_adamw_8bit", "galore_adamw_8bit_layerwise")
"""Names of `optim` whose packages know no other device."""


class Factory:
    """What transformers' Trainer calls to make an optimiser of a model: an instance, with the model and a rule."""

    def __call__(self, model: nn.Module, *, rule: Any, config: Any, task: Task) -> Optimizer:
        """The optimiser of the rule's file."""
        return rule.build(model, config, task)


def choose(configs: Mapping[str, Any], task: Task) -> tuple[type[Factory], dict[str, Any]] | None:
    """`optimizer_cls_and_kwargs` of the Trainer; None leaves it to transformers and `optim`.

    configs: `Run.optim`, the keys of every file in optim/. Raises ConfigError for what is missing or contradicts.
    """
    rules = {name: find("optim", name) for name in configs}
    asked = [name for name, rule in rules.items() if rule.wanted(configs[name], task)]
    # Rounding at random is how AdamW works on bfloat16; a rule that is asked for by its own key comes first.
    named = [name for name in asked if name != "stochastic"] or asked
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)} are optimisers, and a run has one. Keep the keys of one of them.")
    if task.pure_bf16 and named != ["stochastic"]:
        log.warning(
            "WARNING: pure_bf16 with %s: weights are rounded to the nearest bfloat16, so that updates below 1/256 of a "
            "weight vanish. optim: adamw_torch rounds at random and loses none on average.",
            named[0] if named else f"optim: {task.optim}",
        )
    if named:
        if task.args.optim_args and named != ["loraplus"]:
            log.warning("optim_args has no effect: the optimiser is made by %s, whose own keys set it.", named[0])
        return _made_by(named[0], configs[named[0]], task)
    _check_named(task)
    low_rank = low_rank_names.meant(task)
    if low_rank is None:
        _check_settings(task)
    return None if low_rank is None else _made_by(*low_rank)


def _made_by(name: str, config: Any, task: Task) -> tuple[type[Factory], dict[str, Any]]:
    rule = find("optim", name)
    for module, package in rule.PACKAGES.items():
        _need(module, package, f"use_{name}")
    check = vars(rule).get("check")
    if check is not None:
        check(config, task)
    return Factory, {"rule": rule, "config": config, "task": task}


def _check_named(task: Task) -> None:
    """What transformers finds out only after data and model are loaded, or not at all."""
    for start, module, package in PACKAGES:
        if task.optim.startswith(start):
            _need(module, package, f"optim: {task.optim}")
    args = task.args
    if task.optim in CUDA_ONLY and not _has_cuda():
        raise ConfigError(f"optim: {task.optim} needs a CUDA device, and there is none. Use optim: adamw_torch.")
    if task.optim.endswith(("lomo", "_layerwise")):
        _check_in_backward(task)
    if task.optim == "grokadamw":
        log.warning(
            "optim: grokadamw keeps its moments where no checkpoint brings them back: a resumed run begins anew."
        )
    if task.optim.startswith("schedule_free_"):
        if 0 < args.warmup_steps < 1:
            raise ConfigError(f"warmup_steps: optim: {task.optim} wants a number of steps, not a share of all.")
        if str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)) != "constant":
            log.warning("optim: %s plans its own steps; lr_scheduler_type: constant suits it.", task.optim)


def _check_settings(task: Task) -> None:
    """Say what is set and never reaches the optimiser. Raises ConfigError for optim_args that cannot be read."""
    from transformers import Trainer

    args = task.args
    parts = [part for part in (args.optim_args or "").replace(" ", "").split(",") if part]
    changes: dict[str, tuple[str, Any]] = {
        name: (name, default) for name, default in ADAM.items() if getattr(args, name) != default
    }
    for part in parts:
        changes[f"optim_args: {part}"] = ("optim_args", ",".join(other for other in parts if other != part) or None)
    if not changes or task.optim in ("lomo", "adalomo"):  # which want the model, and take none of these
        return

    def settings(**changed: Any) -> dict[str, Any]:
        other = copy.copy(args)  # `replace` would begin the whole set-up of devices and processes again
        vars(other).update(changed)
        return Trainer.get_optimizer_cls_and_kwargs(other)[1]

    try:
        idle = [said for said, (name, value) in changes.items() if settings(**{name: value}) == settings()]
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"optim_args: {args.optim_args!r} cannot be read for optim: {task.optim} ({error}). Write name=number, "
            "separated by commas."
        ) from error
    for said in idle:
        log.warning("%s has no effect on optim: %s.", said, task.optim)


def _check_in_backward(task: Task) -> None:
    """Optimisers that change weights while gradients are computed see no step as a whole."""
    args = task.args
    if args.gradient_accumulation_steps != 1:
        raise ConfigError(
            f"gradient_accumulation_steps: optim: {task.optim} changes weights in every backward pass, so that "
            f"{args.gradient_accumulation_steps} of them would be as many steps. Write 1."
        )
    if args.max_grad_norm:
        log.warning("max_grad_norm has no effect: optim: %s uses up gradients before their norm is known.", task.optim)
    if task.optim in ("lomo", "adalomo") and args.weight_decay:
        log.warning("weight_decay has no effect: transformers does not hand it to optim: %s.", task.optim)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _need(module: str, package: str, key: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{key} needs the package {package}, which is not installed: pip install {package}")
