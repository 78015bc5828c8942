"""OFT: each chosen linear module's input is turned by a trained block-diagonal rotation, so that angles between its
neurons stay as they are (Qiu et al. 2023, arXiv 2306.07280; on quantised models Qiu et al. 2025, arXiv 2506.19847)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.adapters._place import find_place, put
from luthier.core.errors import ConfigError
from luthier.model.modules import as_names

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

IS_ADAPTER = True
"""What is trained is saved as an adapter folder, which `adapter_name_or_path` takes back."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Size and place of the rotations."""

    oft_rank: int = 0
    """Number of blocks of each rotation; 0: as many as oft_block_size gives."""
    oft_block_size: int = 32
    """Rows of each block, where oft_rank is 0; lowered where it does not divide a module's width."""
    oft_target: str | list[str] = "all"
    """Modules that get a rotation: names such as q_proj,v_proj, or all linear modules except the output head."""

    def __post_init__(self) -> None:
        if self.oft_rank < 0 or self.oft_block_size < 0 or not (self.oft_rank or self.oft_block_size):
            raise ConfigError(
                f"oft_rank: {self.oft_rank}, oft_block_size: {self.oft_block_size}; one of them must be above 0."
            )
        if self.oft_rank and self.oft_block_size:
            raise ConfigError(
                f"oft_rank: {self.oft_rank} blocks decide their size themselves, and oft_block_size is "
                f"{self.oft_block_size}. Write oft_block_size: 0 to set oft_rank."
            )
        if not as_names(self.oft_target):
            raise ConfigError("oft_target is empty; name modules, such as q_proj,v_proj, or say all.")


def apply(model: PreTrainedModel, config: Config, *, also: tuple[str, ...], seed: int) -> PeftModel:
    """The model, frozen, with rotations that turn nothing at first, and the modules `also` free."""
    from peft import OFTConfig, TaskType

    place = find_place(model, "oft_target", config.oft_target, also)
    if place.tie:
        raise ConfigError("additional_target: embedding and head of this model are one, which OFT cannot keep tied.")
    settings = OFTConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.oft_rank,
        oft_block_size=config.oft_block_size,
        **place.settings,
    )
    return put(model, settings, place, key="oft_target", kind="OFT", seed=seed)
