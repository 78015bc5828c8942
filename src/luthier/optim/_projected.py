"""What GaLore and APOLLO share: gradients that are projected to a low rank, of all weights together or one at a time.

Their packages keep a projector object for every weight in the optimiser's state. It is saved as plain numbers, so that
a checkpoint can be read without executing anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError
from luthier.optim._task import Task, groups, matrices
from luthier.optim._together import InBackward

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

KEY = "projector"


def check_layerwise(task: Task, key: str) -> None:
    """Raise ConfigError where a step in the middle of the backward pass would be a wrong one."""
    if task.args.fp16:
        raise ConfigError(f"{key}: fp16 scales gradients, and they would be used before that is undone. Use bf16.")


def project(
    model: nn.Module,
    task: Task,
    kind: type[Optimizer],
    projector: type,
    *,
    target: tuple[str, str | list[str]],
    projection: Mapping[str, Any],
    settings: Mapping[str, Any],
    layerwise: bool,
) -> Optimizer:
    """`kind` over all trained weights; those that are not projected get its plain updates.

    target: a key and its value, the modules whose gradients are projected. projection: how, in the package's words.
    layerwise: each weight steps by itself, in the backward pass.
    """
    made = groups(model, task.args.weight_decay, matrices(model, *target), **projection)
    together = kind(made, **settings)
    if not layerwise:
        return readable(together, projector)
    alone = [group | {"params": [parameter]} for group in made for parameter in group["params"]]
    # APOLLO numbers its weights, and draws their projections by these numbers.
    return readable(InBackward(*(kind([group], **settings) for group in alone), state=together.state), projector)


def readable(optimizer: Optimizer, kind: type) -> Optimizer:
    """The optimiser, whose state_dict holds the facts of its projectors instead of objects of `kind`."""

    def facts(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return _each(state_dict, lambda projector: dict(vars(projector)))

    def objects(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return _each(state_dict, lambda known: _made(kind, known))

    optimizer.register_state_dict_post_hook(facts)
    optimizer.register_load_state_dict_pre_hook(objects)
    return optimizer


def _each(state_dict: dict[str, Any], change: Any) -> dict[str, Any]:
    state = {
        index: {name: change(value) if name == KEY else value for name, value in held.items()}
        for index, held in state_dict["state"].items()
    }
    return state_dict | {"state": state}


def _made(kind: type, known: dict[str, Any]) -> Any:
    made = kind(rank=known["rank"])
    vars(made).update(known)
    return made
