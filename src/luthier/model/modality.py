"""The parts of a model that reads images: what sees, what carries over, what speaks; and which of them stand still."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError
from luthier.core.log import get_logger
from luthier.model.modules import as_names, embeddings, linear, matching
from luthier.model.source import sees

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = get_logger("model")

KEYS = {
    "vision": "freeze_vision_tower",
    "projector": "freeze_multi_modal_projector",
    "language": "freeze_language_model",
}
"""Each part, and the key that keeps it still."""
CARRIERS = ("merger", "merger_list", "deepstack_merger_list")
"""Modules that carry over to the language model although they stand inside what sees (Qwen's models)."""


def part_of(model: PreTrainedModel) -> Callable[[str], str] | None:
    """Says of the name of a module or weight which part it belongs to; None for a model that reads text alone."""
    if not sees(model.config):
        return None
    vision, language = model.get_encoder(modality="image"), model.get_decoder()
    names = {id(module): f"{name}." for name, module in reversed(list(model.named_modules()))}
    eye, mouth = names[id(vision)], names[id(language)]
    spoken = (mouth, *(f"{name}." for name in embeddings(model)))

    def part(name: str) -> str:
        if f"{name}.".startswith(eye):
            inside = name[len(eye) :].split(".")
            return "projector" if any(word in CARRIERS for word in inside) else "vision"
        return "language" if f"{name}.".startswith(spoken) else "projector"

    return part


def aimed(model: PreTrainedModel, keys: Any, still: Collection[str]) -> Any:
    """The keys of an adapter with its targets named one by one, none of them in a part that stands still."""
    part = part_of(model)
    if part is None:
        _say_idle(still)
        return keys
    changes = {}
    for key in (item.name for item in fields(keys) if item.name.endswith("_target")):
        wanted, everything = as_names(getattr(keys, key)), linear(model)
        chosen = everything if "all" in wanted else matching(key, wanted, [*everything, *embeddings(model)])
        changes[key] = [name for name in chosen if part(name) not in still]
        if not changes[key]:
            raise ConfigError(f"{key}: all that it names stands still: {_said(still)}.")
    return replace(keys, **changes)


def hold_still(model: PreTrainedModel, still: Collection[str]) -> None:
    """Freeze these parts of a model whose own weights are trained. Raises ConfigError if nothing is left to train."""
    part = part_of(model)
    if part is None:
        _say_idle(still)
        return
    for name, weight in model.named_parameters():
        if part(name) in still:
            weight.requires_grad_(False)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ConfigError(f"nothing is left to train: {_said(still)}.")


def _say_idle(still: Collection[str]) -> None:
    for part in KEYS:
        if (part in still) is (part == "language"):  # not as by default
            log.warning("%s has no effect: the model reads no images.", KEYS[part])


def _said(still: Collection[str]) -> str:
    return ", ".join(f"{KEYS[part]}: true" for part in KEYS if part in still)
