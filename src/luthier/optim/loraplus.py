"""LoRA+: the B matrices of LoRA learn faster than the A matrices (Hayou et al. 2024, arXiv 2402.12354)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.core.errors import ConfigError
from luthier.optim._task import Task

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

PACKAGES: dict[str, str] = {}
"""What must be installed: import name and what to ask pip for."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Learning rates of LoRA's two matrices."""

    loraplus_lr_ratio: float | None = None
    """How many times faster than A (learning_rate) LoRA's B matrices learn; 16 is a good start. Unset: alike."""
    loraplus_lr_embedding: float = 1e-6
    """Learning rate of LoRA matrices beside an embedding, with loraplus_lr_ratio."""

    def __post_init__(self) -> None:
        if self.loraplus_lr_ratio is not None and self.loraplus_lr_ratio <= 0:
            raise ConfigError(f"loraplus_lr_ratio: {self.loraplus_lr_ratio} must be above 0.")


def wanted(config: Config, task: Task) -> bool:
    """Whether the run asks for it."""
    return config.loraplus_lr_ratio is not None


def build(model: nn.Module, config: Config, task: Task) -> Optimizer:
    """The optimiser that `optim` names, with a learning rate for each kind of matrix, by peft."""
    from peft.optimizers import create_loraplus_optimizer
    from transformers import Trainer

    kind, settings = Trainer.get_optimizer_cls_and_kwargs(task.args, model)
    if "params" in settings or "model" in settings or not isinstance(kind, type):
        raise ConfigError(f"loraplus_lr_ratio: optim: {task.optim} makes its own groups of weights. Use adamw_torch.")
    rate = settings.pop("lr")
    return create_loraplus_optimizer(
        model,
        kind,
        lr=rate,
        loraplus_lr_ratio=config.loraplus_lr_ratio,
        loraplus_lr_embedding=config.loraplus_lr_embedding,
        loraplus_weight_decay=task.args.weight_decay,
        **settings,
    )
