"""AdamW on bfloat16 weights with stochastic rounding: what `pure_bf16` trains with.

A bfloat16 number near 1 has neighbours 1/128 apart, so an update of 1e-5 rounds to nothing, every time. Rounded up or
down at random, with the probability that makes the mean right, a thousand of them move it by what they should on
average (Gupta et al. 2015, arXiv 1502.02551). Moments are bfloat16 too and rounded the same way: a second moment that
decays by a thousandth would not move either. So a weight takes 2 bytes, its gradient 2 and its moments 4, half of
float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.optim._task import ADAMW, Task, decay_groups, trained

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

PACKAGES: dict[str, str] = {}
"""What must be installed: import name and what to ask pip for."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Stochastic rounding has no keys of its own; pure_bf16 asks for it."""


def wanted(config: Config, task: Task) -> bool:
    """With pure_bf16 and an AdamW."""
    return task.pure_bf16 and task.optim in ADAMW


def build(model: nn.Module, config: Config, task: Task) -> Optimizer:
    """AdamW over all trained weights."""
    from luthier.optim._rounding import StochasticAdamW

    groups = decay_groups(model, task.args.weight_decay, trained(model), named=True)
    return StochasticAdamW(groups, **task.adam, seed=task.args.seed)
