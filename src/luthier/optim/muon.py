"""Muon: weight matrices move by orthogonalised momentum, everything else by AdamW (Jordan et al. 2024), at the same
rate (scaled as in Liu et al. 2025, arXiv 2502.16982)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.core.errors import ConfigError
from luthier.optim._task import ADAMW, Task, decay_groups, one_of, trained

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

PACKAGES: dict[str, str] = {}
"""What must be installed: import name and what to ask pip for."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Orthogonalised momentum."""

    use_muon: bool = False
    """Train weight matrices (but embeddings and head) with Muon and the rest with AdamW, at the same learning_rate."""


def wanted(config: Config, task: Task) -> bool:
    """Whether the run asks for it."""
    return config.use_muon


def check(config: Config, task: Task) -> None:
    """Raise ConfigError for what does not go together, before anything is loaded."""
    import torch

    one_of(task, "use_muon", ADAMW)
    if "Muon" not in vars(torch.optim):
        raise ConfigError(f"use_muon: needs PyTorch 2.9 or newer, and {torch.__version__} is installed.")


def build(model: nn.Module, config: Config, task: Task) -> Optimizer:
    """PyTorch's Muon and AdamW as one optimiser."""
    import torch

    from luthier.optim._together import Together

    outside = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    apart = {id(p) for module in model.modules() if id(module) in outside for p in module.parameters()}
    weights = [
        (name, parameter, parameter.dim() == 2 and id(parameter) not in apart) for name, parameter in trained(model)
    ]
    matrices = [parameter for _, parameter, hidden in weights if hidden]
    if not matrices:
        raise ConfigError("use_muon: no weight matrix is trained in this run. Leave it out.")
    rate, decay = task.args.learning_rate, task.args.weight_decay
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    rest = decay_groups(model, decay, ((name, parameter) for name, parameter, hidden in weights if not hidden))
    return Together(muon, *([torch.optim.AdamW(rest, **task.adam)] if rest else []))
