"""Drafts from the target's own first layers, its final norm and its output head (LayerSkip, Elhoushi et al. 2024).

No second model and no memory but for a cache. A model that was not trained to be read early drafts poorly.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from luthier.core.errors import ConfigError, ModelError
from luthier.drafters._greedy import Greedy
from luthier.engines.target import Cached
from luthier.model.modules import layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from luthier.engines.drafting import SpeculateConfig
    from luthier.engines.target import Target
    from luthier.model.source import ModelConfig


def build(
    keys: SpeculateConfig, target: Target, tokenizer: PreTrainedTokenizerBase, model_config: ModelConfig
) -> Greedy:
    """The drafter of a run. Raises ConfigError for more layers than there are."""
    assert keys.draft_layers is not None
    return Greedy(Cached(first_layers(target.model, keys.draft_layers), within=target.within), target.vocabulary)


def first_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """A model of the same class with `model`'s own modules, weights and all, but only its first `count` layers.

    It is a new object made from the configuration; `model` is left as it is. Raises ConfigError for a count that is
    not less than the number of layers, ModelError for an architecture that is not put together so.
    """
    name, stack = layers(model)
    if not 1 <= count < len(stack):
        raise ConfigError(f"draft_layers: {count} must be 1 or more and less than the model's {len(stack)} layers.")
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    text.num_hidden_layers = count
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types[:count])
    with torch.device("meta"):
        shallow = type(model)(config)
    *path, last = name.split(".")
    here, there = model, shallow
    for step in [*path, last]:
        for child, module in here.named_children():
            if child != step:
                setattr(there, child, module)
        here, there = here.get_submodule(step), there.get_submodule(step)
    shallow.get_submodule(".".join(path)).register_module(last, nn.ModuleList(stack[:count]))
    lost = [key for key, tensor in [*shallow.named_parameters(), *shallow.named_buffers()] if tensor.is_meta]
    if lost:
        raise ModelError(
            f"draft: early_exit does not know how to cut a {type(model).__name__} short ({', '.join(lost[:3])} stand "
            "outside its layers). Use prompt_lookup or draft_model."
        )
    return shallow.eval()
