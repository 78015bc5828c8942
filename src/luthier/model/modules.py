"""Names inside a model: its layers, its linear modules, its embeddings, and what a user may call them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from luthier.core.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def as_names(value: str | Sequence[str] | None) -> list[str]:
    """A list, or a string of names between commas, as a list; blanks around names do not count."""
    if value is None:
        return []
    parts = value.split(",") if isinstance(value, str) else value
    return [part.strip() for part in parts if part.strip()]


def layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The stack of decoder layers and its name, such as `model.layers` or `transformer.h`."""
    from torch import nn

    count = model.config.get_text_config().num_hidden_layers
    # What sees may have as many layers as what speaks.
    own = {id(module) for module in model.get_decoder().modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and id(module) in own:
            return name, module
    raise ModelError(f"{type(model).__name__} has no list of {count} layers, so layers cannot be chosen by number.")


def expanded_blocks(model: PreTrainedModel, count: int) -> list[str]:
    """Names of the blocks that `luthier expand` added: the last of each of `count` equal runs of layers.

    Raises ConfigError where the layers cannot be cut into so many runs.
    """
    name, stack = layers(model)
    if count < 1 or len(stack) % count:
        raise ConfigError(
            f"freeze_trainable_layers: with use_llama_pro it is the number of blocks that were added, and the "
            f"{len(stack)} layers of the model cannot be cut into {count} equal runs."
        )
    step = len(stack) // count
    return [f"{name}.{index}" for index in range(step - 1, len(stack), step)]


def embeddings(model: PreTrainedModel) -> list[str]:
    """Names of the input embedding and of the output head, each once, also where the two share their weights."""
    wanted = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    return [name for name, module in model.named_modules() if id(module) in wanted]


def tied(model: PreTrainedModel) -> bool:
    """Whether the output head is the input embedding transposed."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and any(weight is embedding.weight for weight in head.parameters())


def linear(model: PreTrainedModel) -> list[str]:
    """Names of every linear module except those of the output head, whatever stands in its place."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    inside_head = {id(module) for module in head.modules()} if head is not None else set()
    # Some methods put layers of their own in the place of linear ones: HQQLinear, QuantLinear, WQLinear ...
    quantised = vars(model.config).get("quantization_config") is not None
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, (nn.Linear, Conv1D)) or (quantised and "Linear" in type(module).__name__))
        and id(module) not in inside_head
    ]


def matching(key: str, wanted: Iterable[str], names: Sequence[str]) -> list[str]:
    """Which of `names` are meant: `wanted` are whole names or their last parts, as in `q_proj` or `self_attn.q_proj`.

    Raises ConfigError for a wanted name that means nothing, listing what there is.
    """
    found: list[str] = []
    for want in wanted:
        hits = [name for name in names if name == want or name.endswith("." + want)]
        if not hits:
            choices = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
            raise ConfigError(f"{key}: the model has no module named {want!r}. Choose from: {choices}.")
        found += [name for name in hits if name not in found]
    return found


def short(names: Sequence[str], rest: Sequence[str]) -> list[str]:
    """The last parts of `names` where these mean no module among `rest`, whole names otherwise."""
    others = {name.rsplit(".", 1)[-1] for name in rest}
    ends = {name: name.rsplit(".", 1)[-1] for name in names}
    return sorted({name if end in others else end for name, end in ends.items()})
