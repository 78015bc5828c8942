"""Which modules an adapter stands on, whatever the adapter is; what LoRA and OFT share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError
from luthier.core.log import get_logger
from luthier.model.modules import as_names, embeddings, linear, matching, short, tied

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

log = get_logger("adapters")


@dataclass(frozen=True)
class Place:
    """Where an adapter goes in one model."""

    targets: tuple[str, ...]
    """Whole names of the modules that get its weights."""
    whole: tuple[str, ...]
    """Whole names of the modules that are trained in full beside it."""
    tie: bool
    """Embedding and head are one, and one of them is trained in full: both must be."""
    modules: tuple[str, ...]
    """All modules of the model."""

    @property
    def settings(self) -> dict[str, Any]:
        """The place, as peft is told of it."""
        names, rest = list(self.targets), [name for name in self.modules if name not in self.targets]
        whole, others = list(self.whole), [name for name in self.modules if name not in self.whole]
        return {"target_modules": short(names, rest), "modules_to_save": short(whole, others) or None}


def find_place(
    model: PreTrainedModel,
    key: str,
    wanted: str | Sequence[str],
    also: Sequence[str],
    *,
    within: Sequence[str] | None = None,
) -> Place:
    """The modules that `wanted` names (all: every linear module but the head), and those of `also`.

    key: what the user calls the list. within: names of modules; only what lies inside them is taken.
    """
    modules = [name for name, _ in model.named_modules() if name]
    whole = matching("additional_target", also, modules)
    tie = tied(model) and bool(set(whole) & set(embeddings(model)))
    if tie:  # peft ties the trained copies only if it is told of both names
        whole = [*whole, *(name for name in embeddings(model) if name not in whole)]
    everything, names = linear(model), as_names(wanted)
    # A user may name what an adapter can stand beside: the output head and the embedding too.
    chosen = everything if "all" in names else matching(key, names, [*everything, *embeddings(model)])
    chosen = [name for name in chosen if name not in whole]
    if not chosen:
        raise ConfigError(f"{key}: every module it names is already trained in full by additional_target.")
    if within is not None:
        chosen = [name for name in chosen if any(name.startswith(f"{part}.") for part in within)]
        if not chosen:
            raise ConfigError(f"{key}: none of the modules it names lies in the expanded blocks.")
    return Place(tuple(chosen), tuple(whole), tie, tuple(modules))


def put(model: PreTrainedModel, settings: PeftConfig, place: Place, *, key: str, kind: str, seed: int) -> PeftModel:
    """The model, frozen, with fresh adapter weights. Says what they did not reach; raises ConfigError."""
    import torch
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            adapted = get_peft_model(model, settings)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{key}: {kind} cannot be put on this model: {error}") from error
    _point_out_frozen(adapted, place.targets, kind)
    return adapted


def _point_out_frozen(model: PeftModel, targets: Sequence[str], kind: str) -> None:
    """Say what an adapter did not reach. Experts of a mixture are stacked into one weight, which is no linear module;
    for some architectures peft wraps those instead of the linear modules of the same names."""
    mark = f".{kind.lower()}_"
    weights = {name.removeprefix("base_model.model."): weight for name, weight in model.named_parameters()}
    reached = {name.split(mark)[0] for name in weights if mark in name}
    stacked = [
        name
        for name, weight in weights.items()
        if weight.dim() == 3 and ".base_layer." not in name and mark not in name
    ]
    frozen = [name for name in targets if name not in reached] + stacked
    if frozen:
        some = ", ".join(frozen[:3]) + (" ..." if len(frozen) > 3 else "")
        log.warning("%s does not reach %d modules, which stay frozen: %s", kind, len(frozen), some)
