"""What every rule is told about the run, and the parameter groups they share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf")
"""Names of `optim` that mean AdamW with states of full size."""
ADAMW_8BIT = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
UNDECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Parameters without weight decay, by name, as in transformers' Trainer."""


@dataclass(frozen=True)
class Task:
    """The run an optimiser is for."""

    args: TrainingArguments
    adapter: bool
    """What is trained is an adapter, not the model's own weights."""
    pure_bf16: bool = False
    """Trained weights are bfloat16."""

    @property
    def optim(self) -> str:
        """transformers' name of the optimiser the rule is applied to."""
        return str(getattr(self.args.optim, "value", self.args.optim))

    @property
    def adam(self) -> dict[str, Any]:
        """Keyword arguments of any Adam."""
        args = self.args
        return {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that are trained, each once, by name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def decayed(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay is for."""
    from torch import nn as layers
    from transformers.trainer_pt_utils import get_parameter_names

    return set(get_parameter_names(model, [layers.LayerNorm], UNDECAYED))


def decay_groups(
    model: nn.Module, weight_decay: float, weights: Iterable[tuple[str, Any]], *, named: bool = False
) -> list[dict[str, Any]]:
    """Parameter groups of these (name, parameter): those with weight decay, then those without; empty ones are left
    out. named: the groups hold names too."""
    decays = decayed(model)
    sides: tuple[list, list] = ([], [])
    for name, parameter in weights:
        sides[name not in decays].append((name, parameter) if named else parameter)
    return [{"params": side, "weight_decay": rate} for side, rate in zip(sides, (weight_decay, 0.0)) if side]


def groups(model: nn.Module, weight_decay: float, special: set[str], **extra: Any) -> list[dict[str, Any]]:
    """Parameter groups: the special ones, by name (with `extra` beside them), and those of `decay_groups`.

    Raises ConfigError where nothing is special.
    """
    chosen = [parameter for name, parameter in trained(model) if name in special]
    if not chosen:
        raise ConfigError("The optimiser finds no weight matrix that it is for among those that are trained.")
    rest = ((name, parameter) for name, parameter in trained(model) if name not in special)
    return [{"params": chosen, "weight_decay": weight_decay, **extra}, *decay_groups(model, weight_decay, rest)]


def matrices(model: nn.Module, key: str, wanted: str | list[str]) -> set[str]:
    """Names of the weights of the linear modules that a list of names means; all: every one but the head's.

    A name means every module that has it anywhere in its own, as in LLaMA-Factory: `mlp` is all three of a layer's.
    """
    from luthier.model.modules import as_names, linear

    everything, names = linear(model), as_names(wanted)
    if "all" in names:
        return {f"{name}.weight" for name in everything}
    for want in names:
        if not any(want in name for name in everything):
            choices = ", ".join(sorted({part for name in everything for part in name.split(".") if not part.isdigit()}))
            raise ConfigError(
                f"{key}: the model has no linear module with {want!r} in its name. Choose from: {choices}."
            )
    return {f"{name}.weight" for name in everything if any(want in name for want in names)}


def one_of(task: Task, key: str, able: Iterable[str]) -> None:
    """Raise ConfigError where `optim` is none of those that a rule can be applied to."""
    able = list(able)
    if task.optim not in able:
        raise ConfigError(f"{key}: goes with optim: {', '.join(able)}, and this run has {task.optim}.")
