"""Muon: weight matrices move by orthogonalised momentum, everything else by AdamW (Jordan et al. 2024), at the same
rate (scaled as in Liu et al. 2025, arXiv 2502.16982)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError
from luthier.optim._task import ADAMW, Task, decayed, one_of, trained

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
    decays, decay = decayed(model), task.args.weight_decay
    chosen: dict[str, list[Any]] = {"muon": [], "plain": [], "undecayed": []}
    for name, parameter in trained(model):
        hidden = parameter.dim() == 2 and id(parameter) not in apart
        chosen["muon" if hidden else "plain" if name in decays else "undecayed"].append(parameter)
    if not chosen["muon"]:
        raise ConfigError("use_muon: no weight matrix is trained in this run. Leave it out.")
    rest = [
        {"params": chosen["plain"], "weight_decay": decay},
        {"params": chosen["undecayed"], "weight_decay": 0.0},
    ]
    rate = task.args.learning_rate
    muon = torch.optim.Muon(chosen["muon"], lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    rest = [group for group in rest if group["params"]]
    return Together(muon, *([torch.optim.AdamW(rest, **task.adam)] if rest else []))
