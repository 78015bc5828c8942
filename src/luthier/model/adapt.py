"""Which weights are trained, and the adapters a model starts from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core import manifest
from luthier.core.errors import ConfigError, ModelError
from luthier.core.log import get_logger
from luthier.core.registry import find
from luthier.model import modality, pissa, rope
from luthier.model.modules import as_names, embeddings, tied
from luthier.model.processor import KeepProcessor
from luthier.model.quantise import prepare_training, quantised
from luthier.model.source import ModelConfig, hub, local_folder, no_source, refuse_scratch, sees

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

log = get_logger("model")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """How much of the model is trained, and what was trained before."""

    finetuning_type: str = "lora"
    """What is trained: the name of a file in adapters/, such as full, freeze or lora."""
    adapter_name_or_path: str | list[str] | None = None
    """Adapters to start from: folders or hub ids, a list or a string with commas. All but the last are merged into the
    model in this order; training goes on with the last."""
    adapter_folder: str | None = None
    """Folder inside each of the adapters' folders that holds the weights."""
    create_new_adapter: bool = False
    """Merge all given adapters and train a new one, instead of going on with the last."""
    additional_target: str | list[str] | None = None
    """Modules trained in full beside the adapter and saved with it, such as embed_tokens,lm_head."""
    freeze_vision_tower: bool = True
    """Of a model that reads images: what sees stands still."""
    freeze_multi_modal_projector: bool = True
    """Of a model that reads images: what carries its sight over to the language model stands still."""
    freeze_language_model: bool = False
    """Of a model that reads images: the language model stands still."""

    @property
    def still(self) -> frozenset[str]:
        """The parts of a model that reads images which are not trained."""
        kept = {
            "vision": self.freeze_vision_tower,
            "projector": self.freeze_multi_modal_projector,
            "language": self.freeze_language_model,
        }
        return frozenset(part for part, still in kept.items() if still)


@dataclass(frozen=True)
class Parameters:
    """How many weights a model has, each counted once, and how many of them are trained."""

    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return f"{self.trainable:,} of {self.total:,} parameters are trained ({share:.4g} %)"


def adapt(
    model: PreTrainedModel,
    config: AdapterConfig,
    keys: Any,
    *,
    model_config: ModelConfig,
    trainable: bool,
    seed: int = 0,
    upcast: bool = True,
) -> PreTrainedModel | PeftModel:
    """The model with its earlier adapters merged and, for training, exactly the wanted weights free to move.

    keys: the `Config` of the file in adapters/ that `finetuning_type` names.
    trainable: False merges every adapter and freezes the model (inference); True returns it in training mode. An
    adapter of a quantised model is not merged, since merging would round it away.
    seed: of an adapter's first weights. upcast: trained 16-bit weights become float32 (`pure_bf16` says no).
    """
    if not trainable:
        refuse_scratch(model_config)
    method = find("adapters", config.finetuning_type)
    folders = adapter_folders(config, model_config)
    goes_on = bool(folders) and trainable and not config.create_new_adapter
    if quantised(model):
        _check_unmerged(folders, trains=config.finetuning_type, trainable=trainable, goes_on=goes_on)
        if trainable:
            prepare_training(model)
        if folders and not trainable:
            return attach(model, folders[0]).requires_grad_(False).eval()
    for folder in folders[: len(folders) - goes_on]:
        model = merge(attach(model, folder))
        log.info("Merged the adapter %s into the model.", folder)
    if not trainable:
        return model.requires_grad_(False).eval()
    if goes_on:
        log.info("The adapter %s is taken up; its own settings hold.", folders[-1])
        model = attach(model, folders[-1], trainable=True)
    else:
        if method.IS_ADAPTER:
            keys = modality.aimed(model, keys, config.still)
        model = method.apply(model, keys, also=_also(model, config, model_config), seed=seed)
        if not method.IS_ADAPTER:
            modality.hold_still(model, config.still)
    return _ready(model, upcast=upcast, config=model_config)


def sidecars(model: nn.Module, config: AdapterConfig, model_config: ModelConfig) -> list[Callable[[Path], None]]:
    """What writes into every folder that a run saves, beside the adapter itself. Ask before the first step."""
    from peft import PeftModel

    kept: list[Callable[[Path], None]] = [KeepProcessor(model_config)] if sees(model.config) else []
    if not isinstance(model, PeftModel) or not pissa.is_pissa(model.active_peft_config):
        return kept
    folders = [] if config.create_new_adapter else adapter_folders(config, model_config)
    return [*kept, pissa.Start(model, folders[-1] if folders else None)]


def finish(config: AdapterConfig, keys: Any, folder: Path) -> None:
    """What is left to do with a trained adapter once it lies in `folder`: see `finish` of the file in adapters/."""
    rounds_off = vars(find("adapters", config.finetuning_type)).get("finish")
    if rounds_off is not None:
        rounds_off(keys, folder)


def adapter_folders(config: AdapterConfig, model_config: ModelConfig) -> list[Path]:
    """Where the adapters of `adapter_name_or_path` lie, fetched from the hub if need be, each checked to be one."""
    names = as_names(config.adapter_name_or_path)
    if names and not find("adapters", config.finetuning_type).IS_ADAPTER:
        raise ConfigError(
            f"adapter_name_or_path does not go with finetuning_type: {config.finetuning_type}, which trains the "
            "model's own weights. Merge the adapter first (luthier export), or use finetuning_type: lora."
        )
    return [_adapter_folder(name, config, model_config) for name in names]


def attach(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PeftModel:
    """The model with the adapter of `folder` on it. Raises ModelError unless every weight found its place."""
    from peft import LoraConfig, PeftConfig, PeftModel
    from safetensors import SafetensorError

    try:
        _check_shapes(model, folder)
        settings = PeftConfig.from_pretrained(str(folder))
        if isinstance(settings, LoraConfig) and settings.ensure_weight_tying and tied(model):
            # peft saves only one of the tied names, and ties again only if that is one of the two it knows
            settings.modules_to_save = [*settings.modules_to_save, *embeddings(model)]
        began = settings.init_lora_weights if pissa.is_pissa(settings) else None
        if began is not None and pissa.take_apart(model, folder, settings):
            settings.init_lora_weights = True
        adapted = PeftModel.from_pretrained(model, str(folder), config=settings, is_trainable=trainable)
        if began is not None:  # what is saved from here is no less a PiSSA adapter
            settings.init_lora_weights = began
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        hint = (
            " If tokens were added when it was trained, set resize_vocab: true and the keys that added them here too."
            if "size mismatch" in str(error)
            else ""
        )
        raise ModelError(f"The adapter {folder} does not fit the model: {error}{hint}") from error
    _check_loaded(adapted, folder)
    rope.remind(model.config, folder)
    return adapted


def merge(model: PeftModel) -> PreTrainedModel:
    """The base model with the adapter added into its weights. Raises ModelError for weights that are not finite."""
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"The adapter cannot be merged: {error}") from error


def count_parameters(model: nn.Module) -> Parameters:
    """Weights of a model, shared ones counted once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return Parameters(sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))


def _adapter_folder(name: str, config: AdapterConfig, model_config: ModelConfig) -> Path:
    folder = local_folder("adapter_name_or_path", name)
    if folder is None:
        folder = _fetch(name, model_config)
    if config.adapter_folder:
        folder = folder / config.adapter_folder
    for file, what in (
        ("adapter_config.json", "is no adapter folder"),
        ("adapter_model.safetensors", "has no adapter weights"),
    ):
        if not (folder / file).is_file():
            from luthier.model.parts import hint

            held = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) if folder.is_dir() else "nothing"
            raise ModelError(
                f"adapter_name_or_path: {folder} {what}{hint(folder)}: no {file}; it holds {held or 'nothing'}."
            )
    try:
        json.loads((folder / "adapter_config.json").read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / 'adapter_config.json'} is not JSON: {error}") from error
    manifest.check_weights("adapter_name_or_path", folder)
    return folder


def _fetch(name: str, model_config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        # The revision is the base model's, so an adapter's own default branch is taken.
        where = {key: value for key, value in hub(model_config).items() if key != "revision"}
        return Path(snapshot_download(name, allow_patterns=["*adapter_*", "*_head.*"], **where))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ModelError(no_source("adapter_name_or_path", name, None, error)) from error


def _shape(layer: nn.Linear | Any) -> tuple[int, ...]:
    """A layer's width on both sides; the weights of a quantised one are packed into another shape."""
    from torch import nn

    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else tuple(layer.weight.shape)


def _check_shapes(model: PreTrainedModel, folder: Path) -> None:
    from safetensors import safe_open
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    with safe_open(str(folder / "adapter_model.safetensors"), "pt") as file:
        for key in file.keys():
            if not (key.startswith(prefix) and key.endswith(suffix)):
                continue
            name = key[len(prefix) : -len(suffix)].removesuffix(".base_layer")  # experts are wrapped twice
            if name not in modules:
                raise ModelError(
                    f"The adapter {folder} was made for another model: it changes {name}, which "
                    f"{type(model).__name__} does not have."
                )
            width, here = file.get_slice(key).get_shape()[1], modules[name]
            if isinstance(here, (nn.Linear, Conv1D)) and width not in _shape(here):
                raise ModelError(
                    f"The adapter {folder} was made for another model: {name} takes {width} numbers there and has "
                    f"shape {_shape(here)} here."
                )


def _check_loaded(adapted: PeftModel, folder: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    there = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    with safe_open(str(folder / "adapter_model.safetensors"), "pt") as file:
        saved = set(file.keys())
    # Of a grown embedding peft also writes the wrapper and the tied name, beside the trained copy that counts.
    double = tuple(f"base_model.model.{name}." for name in embeddings(adapted.get_base_model()))
    if lost := sorted(key for key in saved - set(there) if not key.startswith(double)):
        raise ModelError(f"The adapter {folder} holds weights the model has no place for: {', '.join(lost[:5])}.")
    if random := sorted(set(there) - saved):
        raise ModelError(f"The adapter {folder} lacks weights its config asks for: {', '.join(random[:5])}.")


def _also(model: PreTrainedModel, config: AdapterConfig, model_config: ModelConfig) -> tuple[str, ...]:
    """Modules trained in full beside the method's own. A grown vocabulary is useless while its rows are frozen."""
    given = as_names(config.additional_target)
    if given or not model_config.resize_vocab:
        return tuple(given)
    names = embeddings(model)
    log.info("resize_vocab: %s are trained in full and saved with the adapter.", " and ".join(names))
    return tuple(names)


def _check_unmerged(folders: list[Path], *, trains: str, trainable: bool, goes_on: bool) -> None:
    """A quantised model carries one adapter on top, or none."""
    if trainable and not find("adapters", trains).IS_ADAPTER:
        raise ConfigError(
            f"finetuning_type: {trains} trains the model's own weights, which are quantised. Use lora or oft, or name "
            "the full model."
        )
    if len(folders) > 1 or (folders and trainable and not goes_on):
        raise ConfigError(
            f"adapter_name_or_path: {len(folders)} to be merged into a quantised model, which would round them away. "
            "Merge them into the full model first (luthier export), and name the result in model_name_or_path."
        )


def _ready(model: PreTrainedModel | PeftModel, *, upcast: bool, config: ModelConfig) -> PreTrainedModel | PeftModel:
    import torch

    for parameter in model.parameters():
        # Updates of 1e-5 vanish in 16 bits: what is trained is held in 32.
        if upcast and parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    if config.upcast_layernorm:
        _upcast_norms(model)
    _in_order(model)
    if count_parameters(model).trainable == 0:
        raise ConfigError("Nothing would be trained: every weight of the model is frozen.")
    if config.print_param_status:
        for name, parameter in model.named_parameters():
            state = "trained" if parameter.requires_grad else "frozen"
            log.info("%s  %s  %s  %s  %s", name, tuple(parameter.shape), parameter.dtype, parameter.device, state)
    return model.train()


def _in_order(model: nn.Module) -> None:
    """peft keeps names in sets, whose order differs from process to process; what a run writes must not."""
    from peft import PeftModel

    for settings in model.peft_config.values() if isinstance(model, PeftModel) else ():
        if isinstance(settings.target_modules, set):
            settings.target_modules = sorted(settings.target_modules)


def _upcast_norms(model: nn.Module) -> None:
    """Normalisation layers get float32 weights; what they give goes on in the format of what they are given."""
    import torch

    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if "norm" in type(module).__name__.lower() and any(p.dtype in (torch.float16, torch.bfloat16) for p in own):
            module.float()
            module.register_forward_hook(_back_to_input)


def _back_to_input(module: nn.Module, given: tuple[Any, ...], result: Any) -> Any:
    return result.to(given[0].dtype)
