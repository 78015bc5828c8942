"""GaLore: Adam on gradients of low rank, for full training in less memory (Zhao et al. 2024, arXiv 2403.03507)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from luthier.core.errors import ConfigError
from luthier.optim._projected import readable
from luthier.optim._task import ADAMW, ADAMW_8BIT, Task, groups, matrices, one_of

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

PACKAGES = {"galore_torch": "galore-torch"}
"""What must be installed: import name and what to ask pip for."""

KINDS = {
    **dict.fromkeys(ADAMW, ("GaLoreAdamW", "galore_adamw")),
    **dict.fromkeys(ADAMW_8BIT, ("GaLoreAdamW8bit", "galore_adamw_8bit")),
    "adafactor": ("GaLoreAdafactor", "galore_adafactor"),
}
"""optim -> the package's class, and what transformers calls the same."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Low-rank projections of gradients."""

    use_galore: bool = False
    """Train all weights with GaLore: the optimiser that `optim` names, on projected gradients."""
    galore_target: str | list[str] = "all"
    """Modules whose gradients are projected: names such as q_proj,v_proj, or all linear modules except the head."""
    galore_rank: int = 16
    """Rank of the projections."""
    galore_update_interval: int = 200
    """Steps between two projections."""
    galore_scale: float = 2.0
    """The projected update is scaled by this."""
    galore_proj_type: Literal["std", "reverse_std", "right", "left", "full"] = "std"
    """Which side of a gradient is projected; std: the shorter."""
    galore_layerwise: bool = False
    """Update each weight in the middle of the backward pass, so that no two gradients are held at once. Gradients are
    then not clipped, weight_decay does not apply, and a resumed run begins with fresh moments."""


def wanted(config: Config, task: Task) -> bool:
    """Whether the run asks for it."""
    return config.use_galore


def build(model: nn.Module, config: Config, task: Task) -> Optimizer:
    """GaLore's optimiser over all trained weights; those that are not projected get plain updates."""
    import galore_torch
    import torch
    from galore_torch.galore_projector import GaLoreProjector

    one_of(task, "use_galore", KINDS)
    if task.optim in ADAMW_8BIT and not torch.cuda.is_available():
        raise ConfigError(f"use_galore: with optim: {task.optim} GaLore needs a CUDA device. Use optim: adamw_torch.")
    if config.galore_layerwise:
        return _layerwise(model, config, task)
    targets = matrices(model, "galore_target", config.galore_target)
    kind = getattr(galore_torch, KINDS[task.optim][0])
    made = groups(
        model,
        task.args.weight_decay,
        lambda name, parameter: name in targets,
        rank=config.galore_rank,
        update_proj_gap=config.galore_update_interval,
        scale=config.galore_scale,
        proj_type=config.galore_proj_type,
    )
    return readable(kind(made, **_settings(task)), GaLoreProjector)


def _settings(task: Task) -> dict[str, Any]:
    if task.optim == "adafactor":
        return {"lr": task.args.learning_rate, "scale_parameter": False, "relative_step": False}
    if task.optim in ADAMW_8BIT:
        return task.adam
    return task.adam | {"no_deprecation_warning": True}


def _layerwise(model: nn.Module, config: Config, task: Task) -> Optimizer:
    """By transformers, which hangs an optimiser of its own on every weight."""
    from transformers import Trainer

    if task.args.weight_decay:
        raise ConfigError("galore_layerwise: weight_decay does not apply to it; set weight_decay: 0 or leave one out.")
    targets = matrices(model, "galore_target", config.galore_target)
    args = copy.copy(task.args)  # `replace` would begin the whole set-up of devices and processes again
    args.optim = f"{KINDS[task.optim][1]}_layerwise"
    args.optim_target_modules = sorted(name.removesuffix(".weight") for name in targets)
    args.optim_args = (
        f"rank={config.galore_rank},update_proj_gap={config.galore_update_interval},"
        f"scale={config.galore_scale},proj_type={config.galore_proj_type}"
    )
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    return kind(optimizer_dict=settings["optimizer_dict"], lr=settings["lr"])
