"""GaLore and APOLLO by transformers' names of them (`optim: galore_adamw`), made as by `use_galore` and `use_apollo`.

transformers' own drop betas, epsilon and weight decay, keep the rate as it is layer by layer, and leave objects in
checkpoints that it then refuses to read.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from luthier.core.errors import ConfigError
from luthier.core.registry import find
from luthier.optim._task import Task

KEYS = {
    "rank": "rank",
    "update_proj_gap": "update_interval",
    "scale": "scale",
    "proj": "proj",
    "proj_type": "proj_type",
    "scale_type": "scale_type",
}
"""What `optim_args` calls it -> how our keys end."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "galore": {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"},
    "apollo": {
        "rank": 128,
        "proj": "random",
        "scale_type": "channel",
        "update_proj_gap": 200,
        "scale": 1.0,
        "proj_type": "std",
    },
}
"""transformers' defaults, which are not those of the keys."""


def meant(task: Task) -> tuple[str, Any, Task] | None:
    """(rule, its Config, the task with the optimiser that is projected) of such a name; None for other names.

    Raises ConfigError for what is missing in `optim_target_modules` and wrong in `optim_args`.
    """
    rule, _, base = task.optim.partition("_")
    if rule not in DEFAULTS:
        return None
    targets = task.args.optim_target_modules
    if not targets:
        raise ConfigError(
            f"optim: {task.optim} needs optim_target_modules, such as all-linear. The keys use_galore and use_apollo "
            "choose them by themselves."
        )
    if isinstance(targets, str) and targets.replace("_", "-") == "all-linear":
        targets = "all"
    keys = {f"{rule}_{KEYS[name]}": value for name, value in _given(task, rule).items()}
    keys |= {f"use_{rule}": True, f"{rule}_target": targets, f"{rule}_layerwise": base.endswith("_layerwise")}
    args = copy.copy(task.args)  # `replace` would begin the whole set-up of devices and processes again
    base = base.removesuffix("_layerwise")
    args.optim = "adamw_torch" if base == "adamw" else base
    return rule, find("optim", rule).Config(**keys), replace(task, args=args)


def _given(task: Task, rule: str) -> dict[str, Any]:
    values = dict(DEFAULTS[rule])
    for part in filter(None, (task.args.optim_args or "").replace(" ", "").split(",")):
        name, _, value = part.partition("=")
        if name not in values:
            raise ConfigError(
                f"optim_args: {part}: optim: {task.optim} knows no {name!r}. Choose from: {', '.join(values)}."
            )
        try:
            values[name] = type(values[name])(value)
        except ValueError:
            raise ConfigError(f"optim_args: {part}: expected a number, got {value!r}.") from None
    return values
