"""LoRA: beside each chosen linear module W a product B A of low rank is trained (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.adapters._place import find_place, put
from luthier.core.errors import ConfigError
from luthier.core.log import get_logger
from luthier.model import pissa
from luthier.model.modules import as_names, expanded_blocks

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel
    from transformers import PreTrainedModel

log = get_logger("adapters")

IS_ADAPTER = True
"""What is trained is saved as an adapter folder, which `adapter_name_or_path` takes back."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Size and place of the low-rank matrices."""

    lora_rank: int = 8
    """Rank of the added matrices."""
    lora_alpha: int | None = None
    """The added product is scaled by alpha / rank; unset: twice the rank."""
    lora_dropout: float = 0.0
    """Share of the inputs of the added matrices that is dropped in training."""
    lora_target: str | list[str] = "all"
    """Modules that get an added matrix: names such as q_proj,v_proj, or all linear modules except the output head."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, which keeps large ranks stable (Kalajdzievski 2023, arXiv 2312.03732)."""
    use_dora: bool = False
    """Train the length of each weight column apart from its direction (Liu et al. 2024, arXiv 2402.09353)."""
    pissa_init: bool = False
    """Start from the largest singular vectors of each weight, which is left with the rest (Meng et al. 2024, arXiv
    2404.02948)."""
    pissa_iter: int = 16
    """Rounds of the fast singular value decomposition of pissa_init; -1 computes the exact one."""
    pissa_convert: bool = False
    """When a run with pissa_init is done, also save pissa_converted/: an adapter of twice the rank that fits the model
    as it was before training, in any program."""
    use_llama_pro: bool = False
    """Train only the blocks that `luthier expand` added; freeze_trainable_layers says how many there are."""
    freeze_trainable_layers: int = 2
    """n > 0 trains the last n layers, n < 0 the first -n, 0 none of them. With use_llama_pro: the number of blocks that
    were added. In a lora run it has a meaning only with use_llama_pro."""

    def __post_init__(self) -> None:
        if self.lora_rank < 1:
            raise ConfigError(f"lora_rank: {self.lora_rank} must be 1 or more.")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout: {self.lora_dropout} must be at least 0 and below 1.")
        if not as_names(self.lora_target):
            raise ConfigError("lora_target is empty; name modules, such as q_proj,v_proj, or say all.")
        if self.pissa_iter < 1 and self.pissa_iter != -1:
            raise ConfigError(f"pissa_iter: {self.pissa_iter} must be 1 or more, or -1 for the exact decomposition.")
        if self.pissa_convert and not self.pissa_init:
            raise ConfigError("pissa_convert needs pissa_init: true, whose adapter it converts.")
        if self.pissa_init and self.use_dora:
            raise ConfigError("pissa_init: a DoRA adapter cannot be told apart from what it starts with. Keep one.")


def apply(model: PreTrainedModel, config: Config, *, also: tuple[str, ...], seed: int) -> PeftModel:
    """The model, frozen, with fresh LoRA matrices (at first nothing changes) and the modules `also` free."""
    from peft import LoraConfig, TaskType

    within = None
    if config.use_llama_pro:
        within = expanded_blocks(model, config.freeze_trainable_layers)
    elif config.freeze_trainable_layers != Config.freeze_trainable_layers:
        log.warning("freeze_trainable_layers has no effect: this run trains an adapter, without use_llama_pro.")
    place = find_place(model, "lora_target", config.lora_target, also, within=within)
    settings = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=_start(config, model),
        ensure_weight_tying=place.tie,
        **place.settings,
    )
    return put(model, settings, place, key="lora_target", kind="LoRA", seed=seed)


def finish(config: Config, folder: Path) -> None:
    """The adapter of a PiSSA run as one for the model before training, if the run asks for it."""
    if config.pissa_convert:
        pissa.convert(folder)


def _start(config: Config, model: PreTrainedModel) -> bool | str:
    # A model on the meta device (`luthier check`) has shapes and no numbers to decompose.
    if not config.pissa_init or model.device.type == "meta":
        return True
    return "pissa" if config.pissa_iter == -1 else f"pissa_niter_{config.pissa_iter}"
