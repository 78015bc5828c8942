"""BAdam: Adam on one block of layers at a time, for full training in the memory of a block (Luo et al. 2024, arXiv
2404.02827)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from luthier.core.errors import ConfigError
from luthier.optim._task import ADAMW, Task, decay_groups, one_of, trained

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

PACKAGES = {"badam": "badam"}
"""What must be installed: import name and what to ask pip for."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which layer moves, and when the next one's turn is."""

    use_badam: bool = False
    """Train the weights block by block with BAdam."""
    badam_start_block: int | None = None
    """The layer that is trained first; unset: the first in the order of badam_switch_mode."""
    badam_switch_mode: Literal["ascending", "descending", "random", "fixed"] = "ascending"
    """Order of the layers; fixed: badam_start_block alone is trained."""
    badam_switch_interval: int | None = 50
    """Steps until the next layer's turn; -1: all steps are the first one's."""
    badam_verbose: Literal[0, 1, 2] = 0
    """How much BAdam says: 0 nothing, 1 the block in turn, 2 its weights."""

    def __post_init__(self) -> None:
        if self.badam_switch_mode == "fixed" and self.badam_start_block is None and self.use_badam:
            raise ConfigError("badam_switch_mode: fixed trains one block: set badam_start_block.")


def wanted(config: Config, task: Task) -> bool:
    """Whether the run asks for it."""
    return config.use_badam


def check(config: Config, task: Task) -> None:
    """Raise ConfigError for what does not go together, before anything is loaded."""
    one_of(task, "use_badam", ADAMW)


def build(model: nn.Module, config: Config, task: Task) -> Optimizer:
    """BAdam around the AdamW that `optim` names."""
    import torch
    from badam import BlockOptimizer

    class Blocks(BlockOptimizer):
        """BAdam's, which can also be saved in the middle of a block and go on."""

        def __init__(self, **settings: Any):
            super().__init__(**settings)
            # BAdam hands out the inner optimiser's state alone, which forgets whose turn it is.
            del vars(self)["state_dict"]

        def state_dict(self) -> dict[str, Any]:
            """The inner optimiser's state, the float32 copy of the block in turn, and the order of turns."""
            turns = {"step": self.global_step, "next": self.current_block_idx, "now": list(self.active_param_prefixs)}
            master = [weight.detach().clone() for weight in self.param_idx2hp.values()]
            order = list(vars(self).get("block_order", []))
            turns["rates"] = [group["lr"] for group in self.param_groups]
            return {"inner": self.base_optimizer.state_dict(), "turns": turns, "master": master, "order": order}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """Go back to the block in turn; the model's own weights are loaded by others."""
            turns = state_dict["turns"]
            self.current_block_idx = self.block_prefix_list.index(turns["now"])
            self.block_order = list(state_dict["order"]) or [turns["next"]]
            self.switch_trainable_params(verbose=0)
            self.block_order = list(state_dict["order"])
            self.global_step, self.current_block_idx = turns["step"], turns["next"]
            for weight, kept in zip(self.param_idx2hp.values(), state_dict["master"]):
                weight.data.copy_(kept)
            self.base_optimizer.state = defaultdict(dict)
            self.base_optimizer.load_state_dict(state_dict["inner"])
            # Schedules set the rate of these groups, and the next step takes it from there.
            for group, rate in zip(self.param_groups, turns["rates"]):
                group["lr"] = rate

    never = 1 << 62
    interval = never if config.badam_switch_interval in (None, -1) else config.badam_switch_interval
    # BAdam takes the weight decay of the first group for all.
    groups = decay_groups(model, task.args.weight_decay, trained(model))
    return Blocks(
        base_optimizer=torch.optim.AdamW(groups, **task.adam),
        named_parameters_list=trained(model),
        switch_block_every=interval,
        start_block=config.badam_start_block,
        switch_mode=config.badam_switch_mode,
        verbose=config.badam_verbose,
    )
