"""LoRA: beside each chosen linear module W a product B A of low rank is trained (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.core.errors import ConfigError
from luthier.core.log import get_logger
from luthier.model.modules import as_names, embeddings, linear, matching, short, tied

if TYPE_CHECKING:
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

    def __post_init__(self) -> None:
        if self.lora_rank < 1:
            raise ConfigError(f"lora_rank: {self.lora_rank} must be 1 or more.")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout: {self.lora_dropout} must be at least 0 and below 1.")
        if not as_names(self.lora_target):
            raise ConfigError("lora_target is empty; name modules, such as q_proj,v_proj, or say all.")


def apply(model: PreTrainedModel, config: Config, *, also: tuple[str, ...], seed: int) -> PeftModel:
    """The model, frozen, with fresh LoRA matrices (B = 0: at first nothing changes) and the modules `also` free."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    modules = [name for name, _ in model.named_modules() if name]
    whole = matching("additional_target", also, modules)
    shared = tied(model) and bool(set(whole) & set(embeddings(model)))
    if shared:  # peft ties the trained copies only if it is told of both names
        whole = [*whole, *(name for name in embeddings(model) if name not in whole)]
    targets = _targets(model, config, whole)
    settings = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=short(targets, [name for name in modules if name not in targets]),
        modules_to_save=short(whole, [name for name in modules if name not in whole]) or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        ensure_weight_tying=shared,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            adapted = get_peft_model(model, settings)
        except ValueError as error:
            raise ConfigError(f"lora_target: LoRA cannot be put on this model: {error}") from error
    _point_out_frozen(adapted, targets)
    return adapted


def _point_out_frozen(model: PeftModel, targets: list[str]) -> None:
    """Say what LoRA did not reach. Experts of a mixture are stacked into one weight, which is no linear module; for
    some architectures peft wraps those instead of the linear modules of the same names."""
    weights = {name.removeprefix("base_model.model."): weight for name, weight in model.named_parameters()}
    reached = {name.split(".lora_")[0] for name in weights if ".lora_" in name}
    stacked = [name for name, weight in weights.items() if weight.dim() == 3 and ".base_layer." not in name]
    frozen = [name for name in targets if name not in reached] + stacked
    if frozen:
        some = ", ".join(frozen[:3]) + (" ..." if len(frozen) > 3 else "")
        log.warning("LoRA does not reach %d modules, which stay frozen: %s", len(frozen), some)


def _targets(model: PreTrainedModel, config: Config, whole: list[str]) -> list[str]:
    """Whole names of the modules that get matrices; those in `whole` are trained in full already."""
    everything = linear(model)
    wanted = as_names(config.lora_target)
    chosen = everything if "all" in wanted else matching("lora_target", wanted, _possible(model))
    chosen = [name for name in chosen if name not in whole]
    if not chosen:
        raise ConfigError("lora_target: every module it names is already trained in full by additional_target.")
    return chosen


def _possible(model: PreTrainedModel) -> list[str]:
    """Modules a user may name: what LoRA can stand beside, the output head and the embedding too."""
    return [*linear(model), *(name for name in embeddings(model))]
