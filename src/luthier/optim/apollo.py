"""APOLLO: learning rates per channel from randomly projected gradients, AdamW in SGD's memory (Zhu et al. 2024, arXiv
2412.05270)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from luthier.core.errors import ConfigError
from luthier.optim._projected import check_layerwise, project
from luthier.optim._task import ADAMW, Task, matrices, one_of, trained

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

PACKAGES = {"apollo_torch": "apollo-torch"}
"""What must be installed: import name and what to ask pip for."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Random projections of gradients."""

    use_apollo: bool = False
    """Train all weights with APOLLO."""
    apollo_target: str | list[str] = "all"
    """Modules whose gradients are projected: names such as q_proj,v_proj, or all linear modules except the head."""
    apollo_rank: int = 16
    """Rank of the projections; 1 with apollo_scale_type: tensor is APOLLO-Mini."""
    apollo_update_interval: int = 200
    """Steps between two projections."""
    apollo_scale: float = 32.0
    """Updates of projected weights are scaled by its root; 1 with ranks of a quarter of the width, 128 for Mini."""
    apollo_proj: Literal["random", "svd"] = "random"
    """What gradients are projected by: random numbers, or their largest singular vectors."""
    apollo_proj_type: Literal["std", "right", "left"] = "std"
    """Which side of a gradient is projected; std: the shorter."""
    apollo_scale_type: Literal["channel", "tensor"] = "channel"
    """One learning rate for each channel, or one for a whole weight."""
    apollo_scale_front: bool = False
    """Limit the norm of an update before it is scaled, instead of after."""
    apollo_layerwise: bool = False
    """Update each weight in the middle of the backward pass, so that no two gradients are held at once. Gradients are
    then not clipped."""


def wanted(config: Config, task: Task) -> bool:
    """Whether the run asks for it."""
    return config.use_apollo


def check(config: Config, task: Task) -> None:
    """Raise ConfigError for what does not go together, before anything is loaded."""
    one_of(task, "use_apollo", ADAMW)
    if config.apollo_layerwise:
        check_layerwise(task, "apollo_layerwise")


def build(model: nn.Module, config: Config, task: Task) -> Optimizer:
    """APOLLO over all trained weights; those that are not projected get plain AdamW updates."""
    from apollo_torch import APOLLOAdamW
    from apollo_torch.random_projector import GradientProjector
    from apollo_torch.svd_projector import GaLoreProjector

    _check_channels(model, config)
    return project(
        model,
        task,
        APOLLOAdamW,
        GradientProjector if config.apollo_proj == "random" else GaLoreProjector,
        target=("apollo_target", config.apollo_target),
        projection={
            "rank": config.apollo_rank,
            "proj": config.apollo_proj,
            "proj_type": config.apollo_proj_type,
            "update_proj_gap": config.apollo_update_interval,
            "scale": config.apollo_scale,
            "scale_type": config.apollo_scale_type,
        },
        settings=task.adam | {"scale_front": config.apollo_scale_front, "no_deprecation_warning": True},
        layerwise=config.apollo_layerwise,
    )


def _check_channels(model: nn.Module, config: Config) -> None:
    """Raise ConfigError where the package would scale channels along the side that is projected, and break."""
    if config.apollo_scale_type != "channel" or config.apollo_proj_type == "std":
        return
    chosen = matrices(model, "apollo_target", config.apollo_target)
    for name, weight in trained(model):
        if name in chosen and (weight.shape[0] < weight.shape[1]) != (config.apollo_proj_type == "left"):
            rows, columns = weight.shape
            raise ConfigError(
                f"apollo_proj_type: {config.apollo_proj_type} does not suit {name} ({rows} x {columns}): with "
                "apollo_scale_type: channel the shorter side is projected. Write std, or apollo_scale_type: tensor."
            )
