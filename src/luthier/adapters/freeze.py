"""Freeze fine-tuning: some layers of the model are trained, the rest stands still."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.core.errors import ConfigError
from luthier.model.modules import as_names, expanded_blocks, layers, matching

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

IS_ADAPTER = False
"""What is trained are the model's own weights, saved as a whole model."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which layers, and which modules of them."""

    use_llama_pro: bool = False
    """Train only the blocks that `luthier expand` added; freeze_trainable_layers says how many there are."""
    freeze_trainable_layers: int = 2
    """n > 0 trains the last n layers, n < 0 the first -n, 0 none of them. With use_llama_pro: the number of blocks that
    were added. In a lora run it has a meaning only with use_llama_pro."""
    freeze_trainable_modules: str | list[str] = "all"
    """Modules of those layers to train, such as mlp,self_attn; all for whole layers."""
    freeze_extra_modules: str | list[str] | None = None
    """Modules outside the layers to train too, such as embed_tokens,norm,lm_head."""


def apply(model: PreTrainedModel, config: Config, *, also: tuple[str, ...], seed: int) -> PreTrainedModel:
    """Free the wanted modules, freeze the rest. `seed` changes nothing: nothing is new."""
    model.requires_grad_(False)
    for module in _inside(model, config) + _outside(model, [*as_names(config.freeze_extra_modules), *also]):
        module.requires_grad_(True)
    return model


def _inside(model: PreTrainedModel, config: Config) -> list[nn.Module]:
    _, stack = layers(model)
    wanted = as_names(config.freeze_trainable_modules)
    choices = {name for layer in stack for name, _ in layer.named_children()}
    for name in wanted:
        if name != "all" and name not in choices:
            raise ConfigError(
                f"freeze_trainable_modules: the layers of the model have no module named {name!r}. "
                f"Choose from: all, {', '.join(sorted(choices))}."
            )
    count = config.freeze_trainable_layers
    if config.use_llama_pro:
        chosen = [model.get_submodule(name) for name in expanded_blocks(model, count)]
    else:
        chosen = list(stack)[-count:] if count > 0 else list(stack)[:-count]
    if "all" in wanted:
        return chosen
    return [module for layer in chosen for name, module in layer.named_children() if name in wanted]


def _outside(model: PreTrainedModel, wanted: list[str]) -> list[nn.Module]:
    if not wanted:
        return []
    stack, _ = layers(model)
    # Only modules that hold weights of their own: choosing the whole of `model` by name would be no choice.
    names = [
        name
        for name, module in model.named_modules()
        if not name.startswith(stack + ".") and any(True for _ in module.parameters(recurse=False))
    ]
    return [model.get_submodule(name) for name in matching("freeze_extra_modules", wanted, names)]
