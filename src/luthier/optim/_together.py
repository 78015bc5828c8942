"""Several optimisers that step, save and load as one, together or each in its turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class Together(torch.optim.Optimizer):
    """Several optimisers, each with parameters of its own, that step, save and load as one."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Every part works on the groups and the state of the whole."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; what is loaded replaces groups and state."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of every part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


class InBackward(Together):
    """An optimiser for each weight, which steps as soon as its gradient is there and then lets go of that.

    state: what they begin with, by weight.
    """

    def __init__(self, *parts: torch.optim.Optimizer, state: Mapping[Any, Any]):
        super().__init__(*parts)
        self.state.update(state)
        for part in parts:
            for group in part.param_groups:
                for parameter in group["params"]:
                    parameter.register_post_accumulate_grad_hook(_stepping(part))

    def step(self, closure: Any = None) -> Any:
        """Nothing is left to do once the gradients have been computed."""
        return None if closure is None else closure()


def _stepping(part: torch.optim.Optimizer) -> Any:
    def step(parameter: torch.Tensor) -> None:
        part.step()
        parameter.grad = None

    return step
