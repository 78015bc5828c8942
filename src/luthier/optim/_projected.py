"""Optimisers that keep a projector object in their state: saved as plain numbers, so that a checkpoint can be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.optim import Optimizer

KEY = "projector"


def readable(optimizer: Optimizer, kind: type) -> Optimizer:
    """The optimiser, whose state_dict holds the facts of its projectors instead of objects of `kind`.

    Checkpoints are read without pickled classes; facts are turned back into projectors when they are loaded.
    """

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
