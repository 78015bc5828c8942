"""GaLore: Adam on gradients of low rank, for full training in less memory (Zhao et al. 2024, arXiv 2403.03507)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from luthier.core.errors import ConfigError
from luthier.optim._projected import check_layerwise, project
from luthier.optim._task import ADAMW, ADAMW_8BIT, Task, one_of

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

PACKAGES = {"galore_torch": "galore-torch"}
"""What must be installed: import name and what to ask pip for."""

KINDS = {
    **dict.fromkeys(ADAMW, "GaLoreAdamW"),
    **dict.fromkeys(ADAMW_8BIT, "GaLoreAdamW8bit"),
    "adafactor": "GaLoreAdafactor",
}
"""optim -> the package's class."""


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
    then not clipped."""


def wanted(config: Config, task: Task) -> bool:
    """Whether the run asks for it."""
    return config.use_galore


def check(config: Config, task: Task) -> None:
    """Raise ConfigError for what does not go together, before anything is loaded."""
    import torch

    one_of(task, "use_galore", KINDS)
    if task.optim in ADAMW_8BIT and not torch.cuda.is_available():
        raise ConfigError(f"use_galore: with optim: {task.optim} GaLore needs a CUDA device. Use optim: adamw_torch.")
    if config.galore_layerwise:
        check_layerwise(task, "galore_layerwise")


def build(model: nn.Module, config: Config, task: Task) -> Optimizer:
    """GaLore's optimiser over all trained weights; those that are not projected get plain updates."""
    import galore_torch
    from galore_torch.galore_projector import GaLoreProjector

    return project(
        model,
        task,
        getattr(galore_torch, KINDS[task.optim]),
        GaLoreProjector,
        target=("galore_target", config.galore_target),
        projection={
            "rank": config.galore_rank,
            "update_proj_gap": config.galore_update_interval,
            "scale": config.galore_scale,
            "proj_type": config.galore_proj_type,
        },
        settings=_settings(task),
        layerwise=config.galore_layerwise,
    )


def _settings(task: Task) -> dict[str, Any]:
    if task.optim == "adafactor":
        return {"lr": task.args.learning_rate, "scale_parameter": False, "relative_step": False}
    if task.optim in ADAMW_8BIT:
        return task.adam
    return task.adam | {"no_deprecation_warning": True}
