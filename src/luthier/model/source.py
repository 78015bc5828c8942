"""Where a model comes from: its keys, its folder or its hub, and the settings that lie there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from luthier.core import hubs
from luthier.core.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how it is loaded."""

    model_name_or_path: str
    """Folder of the model, or its id on the Hugging Face hub; on ModelScope with USE_MODELSCOPE_HUB=1."""
    model_revision: str = "main"
    """Branch, tag or commit on the hub."""
    cache_dir: str | None = None
    """Where downloads are kept; unset: the usual cache of the Hugging Face hub."""
    hf_hub_token: str | None = None
    """Token for models and data on the hub that need one; unset: what `hf auth login` stored."""
    ms_hub_token: str | None = None
    """Token for models and data on ModelScope; unset: what `modelscope login` stored."""
    om_hub_token: str | None = None
    """Token for models and data on Modelers (openMind); unset: what its own login stored."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models you trust as you trust programs."""
    torch_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Number format of the weights. auto: float32 in training, the model's own elsewhere. What is trained becomes
    float32 unless `pure_bf16` is set."""
    infer_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Number format of the weights in chat, infer and export. auto: as `torch_dtype`."""
    flash_attn: Literal["auto", "disabled", "eager", "sdpa", "fa2", "fa3", "flex"] = "auto"
    """Attention implementation of chat, infer and the rest; `disabled` is `eager`. Training attends by Luthier's own
    masks, through SDPA or FlexAttention, except with `disabled`."""
    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | None = None
    """Stretch rotary positions by ceil(cutoff_len / the model's own length), where cutoff_len is longer than that."""
    train_from_scratch: bool = False
    """Start from random weights; only the architecture is taken from the folder."""
    add_tokens: str | list[str] | None = None
    """Ordinary tokens to add to the tokenizer: a list, or a string with commas."""
    add_special_tokens: str | list[str] | None = None
    """Special tokens to add to the tokenizer: a list, or a string with commas. Left out of decoded text."""
    new_special_tokens_config: str | None = None
    """YAML file of special tokens to add, `"<token>": words that describe it`."""
    init_special_tokens: Literal["noise_init", "desc_init", "desc_init_w_noise"] = "noise_init"
    """First embedding of an added token: the mean of all embeddings plus noise, or the mean of those of the words that
    new_special_tokens_config describes it with, without or with noise."""
    resize_vocab: bool = False
    """Grow the embeddings to the size of the tokenizer. With an adapter, embeddings and head are then trained whole."""
    split_special_tokens: bool = False
    """Cut special tokens written in texts into pieces, as if they were ordinary words."""
    upcast_layernorm: bool = False
    """Train with the weights of normalisation layers in float32, whatever format the rest is in."""
    moe_aux_loss_coef: float | None = None
    """Add so many times the router's load-balancing loss to the loss of a mixture of experts. Rows are padded then:
    which tokens share a prefix must not change how often an expert is counted."""
    print_param_status: bool = False
    """List every parameter with its number format, device and whether it is trained."""

    def __post_init__(self) -> None:
        if not self.model_name_or_path.strip():
            raise ConfigError("model_name_or_path is empty; give a model's folder or its id on the hub.")
        if self.init_special_tokens != "noise_init" and self.new_special_tokens_config is None:
            raise ConfigError(
                f"init_special_tokens: {self.init_special_tokens} needs new_special_tokens_config, which describes the "
                "tokens. Set it, or leave init_special_tokens out."
            )
        if self.moe_aux_loss_coef is not None and self.moe_aux_loss_coef < 0:
            raise ConfigError(f"moe_aux_loss_coef: {self.moe_aux_loss_coef} must be at least 0.")


def refuse_scratch(config: ModelConfig) -> None:
    """Raise ConfigError where random weights would be used as if they were a model: everywhere but in training."""
    if config.train_from_scratch:
        raise ConfigError(
            "train_from_scratch: true makes random weights, which only training can use. To use what was trained, "
            "set model_name_or_path to its folder and leave train_from_scratch out."
        )


def hub(config: ModelConfig) -> dict[str, Any]:
    """What every `from_pretrained` is told about the hub."""
    return {"revision": config.model_revision, "cache_dir": config.cache_dir, "token": config.hf_hub_token}


def local_folder(key: str, name: str) -> Path | None:
    """The folder `name` means, or None where it can only be an id on the hub.

    Raises ModelError for a path that does not exist or is a file; `key` is named in the message.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{key}: {name} is a file. Give the folder that holds the model.")
    if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name):
        raise ModelError(f"{key}: there is no folder {name} (looked for {path.absolute()}).")
    return None


def model_folder(config: ModelConfig) -> Path | None:
    """The folder of the model, fetched where another hub than Hugging Face's is chosen; None for an id on that one."""
    folder = local_folder("model_name_or_path", config.model_name_or_path)
    other = hubs.chosen()
    if folder is not None or other is None:
        return folder
    return hubs.snapshot(
        other,
        config.model_name_or_path,
        kind="model",
        place="model_name_or_path",
        access=access(config),
        revision=config.model_revision,
    )


def access(config: ModelConfig) -> hubs.Access:
    """How the run of a model may reach hubs, for its data too."""
    tokens = {"hf": config.hf_hub_token, "modelscope": config.ms_hub_token, "openmind": config.om_hub_token}
    return hubs.Access(tokens=tokens, cache_dir=config.cache_dir)


def read_settings(config: ModelConfig) -> PretrainedConfig:
    """The model's config.json, checked to be that of a language model, or of one that reads images too."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    name = config.model_name_or_path
    folder = model_folder(config)
    if folder is not None:
        _check_folder(folder, weights=not config.train_from_scratch)
    try:
        settings = AutoConfig.from_pretrained(folder or name, trust_remote_code=config.trust_remote_code, **hub(config))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(no_source("model_name_or_path", name, folder, error)) from error
    remote = "AutoModelForCausalLM" in (settings.to_dict().get("auto_map") or {})
    if type(settings) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote and not sees(settings):
        made = ", ".join(settings.architectures or []) or settings.model_type
        raise ModelError(f"{name} is no causal language model: its architecture is {made}.")
    return settings


def sees(settings: PretrainedConfig) -> bool:
    """Whether a config.json is that of a model which reads images beside text."""
    from transformers.models.auto import modeling_auto as auto

    made = set(settings.architectures or ())
    named = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(settings.model_type)
    known = made & {named} if made else type(settings) not in auto.MODEL_FOR_CAUSAL_LM_MAPPING
    return named is not None and bool(known)


def auto_class(settings: PretrainedConfig) -> Any:
    """What loads the model of a config.json."""
    import transformers

    return transformers.AutoModelForImageTextToText if sees(settings) else transformers.AutoModelForCausalLM


def no_source(key: str, name: str, folder: Path | None, error: Exception) -> str:
    """Why a folder or a hub id could not be read."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if folder is not None:
        return f"{key}: {folder} cannot be read: {reason}"
    return (
        f"{key}: {name} is not a local folder (looked for {Path(name).absolute()}), and the Hugging Face hub does not "
        f"give it, is not reachable or needs a token: {reason}"
    )


def _check_folder(folder: Path, *, weights: bool) -> None:
    held = sorted(path.name for path in folder.iterdir())
    listing = f"it holds {', '.join(held[:6])}{' ...' if len(held) > 6 else ''}" if held else "it is empty"
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ModelError(
            f"model_name_or_path: {folder} is an adapter. Give it as adapter_name_or_path, and its base model here."
        )
    if not (folder / "config.json").exists():
        raise ModelError(f"model_name_or_path: {folder} is no model folder: it has no config.json; {listing}.")
    files = [
        name for name in held if name.endswith((".safetensors", ".bin")) and not name.endswith("_head.safetensors")
    ]
    if weights and not files:
        from luthier.model.parts import hint

        raise ModelError(f"model_name_or_path: {folder} has no weights (*.safetensors){hint(folder)}; {listing}.")
