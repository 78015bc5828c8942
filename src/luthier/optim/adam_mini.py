"""Adam-mini: one second moment for each head, neuron or token instead of each number (Zhang et al. 2024, arXiv
2406.16793)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.core.errors import ConfigError
from luthier.optim._task import ADAMW, Task, one_of, trained

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

PACKAGES = {"adam_mini": "adam-mini"}
"""What must be installed: import name and what to ask pip for."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Half of Adam's memory."""

    use_adam_mini: bool = False
    """Train all weights with Adam-mini."""


def wanted(config: Config, task: Task) -> bool:
    """Whether the run asks for it."""
    return config.use_adam_mini


def check(config: Config, task: Task) -> None:
    """Raise ConfigError for what does not go together, before anything is loaded."""
    one_of(task, "use_adam_mini", ADAMW)
    if task.adapter:
        raise ConfigError("use_adam_mini: goes by the heads of whole weights, and this run trains an adapter.")


def build(model: nn.Module, config: Config, task: Task) -> Optimizer:
    """Adam-mini over all trained weights; raises ConfigError for models whose heads it would cut in wrong places."""
    from adam_mini import Adam_mini

    facts = model.config.get_text_config()
    size = getattr(facts, "head_dim", None) or facts.hidden_size // facts.num_attention_heads
    if size * facts.num_attention_heads != facts.hidden_size:
        raise ConfigError(
            f"use_adam_mini: takes a head to be hidden_size / heads wide, and this model has "
            f"{facts.num_attention_heads} heads of {size} in {facts.hidden_size}. Leave it out; optim: adamw_8bit "
            "saves memory too."
        )
    return Adam_mini(
        trained(model),
        **task.adam,
        weight_decay=task.args.weight_decay,
        dim=facts.hidden_size,
        n_heads=facts.num_attention_heads,
        n_kv_heads=getattr(facts, "num_key_value_heads", None),
        verbose=False,
    )
