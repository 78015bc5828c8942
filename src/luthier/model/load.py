"""A causal language model from a folder or from the Hugging Face hub, complete or not at all."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from luthier.core import hubs, manifest
from luthier.core.errors import ConfigError, ModelError
from luthier.core.log import get_logger
from luthier.model import quantise, rope
from luthier.model.quantise import QuantConfig

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = get_logger("model")

ATTENTION = {
    "auto": None,
    "disabled": "eager",
    "eager": "eager",
    "sdpa": "sdpa",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
    "flex": "flex_attention",
}
"""What users call attention implementations, and what transformers does; None leaves the choice to transformers."""

PACKAGES = {"fa2": "flash-attn", "fa3": "flash-attn-3"}
"""What the attention implementations need that are no part of PyTorch."""


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


def load_model(
    config: ModelConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
    attn: str | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    quant: QuantConfig | None = None,
    length: int | None = None,
    sharded: bool = False,
) -> PreTrainedModel:
    """The model of `config`, in evaluation mode, every weight of it from the checkpoint.

    tokenizer: checked against the vocabulary, which grows to it with `resize_vocab`.
    dtype: what the caller wants where the user left `torch_dtype` at auto; None is for inference, where `infer_dtype`
    comes first and the checkpoint's own format last.
    attn: attention implementation in transformers' words; None follows `flash_attn`.
    seed: of random weights and of the noise in new embedding rows.
    quant: keep the linear layers in few bits; such a model stays frozen.
    length: the longest row in tokens, for `rope_scaling`; None where positions do not matter.
    sharded: FSDP or ZeRO-3 will spread the weights over processes.
    Raises ModelError for anything that is not a whole causal language model.
    """
    import torch

    from luthier.model import vocabulary

    wanted = _dtype(config, dtype)
    implementation = attn or _attention(config)
    settings = read_settings(config)
    if length is not None and config.rope_scaling is not None:
        rope.stretch(settings, config.rope_scaling, length)
    told, method = quantise.loading(quant or QuantConfig(), settings, wanted, sharded=sharded)
    spread = None if method is None else quantise.placement(quant or QuantConfig(), device, sharded=sharded)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if config.train_from_scratch:
            _refuse_scratch_in_bits(method)
            model = _scratch(config, settings, wanted, implementation)
        else:
            how = {"quantization_config": told, "device_map": spread}
            model = _pretrained(config, settings, wanted, implementation, how)
    _mend_generation(model)
    if tokenizer is not None:
        vocabulary.fit(model, tokenizer, config, seed)
    if device is not None and method is None:  # quantised weights are where they were made
        model.to(device)
    return model.eval()


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


def _dtype(config: ModelConfig, wanted: torch.dtype | None) -> torch.dtype | None:
    import torch

    names = [config.torch_dtype] if wanted is not None else [config.infer_dtype, config.torch_dtype]
    chosen = next((name for name in names if name != "auto"), None)
    return wanted if chosen is None else getattr(torch, chosen)


def _attention(config: ModelConfig) -> str | None:
    """transformers' name of `flash_attn`; raises ConfigError where its package is missing."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    there = {"fa2": is_flash_attn_2_available, "fa3": is_flash_attn_3_available}
    name = config.flash_attn
    if name in there and not there[name]():
        raise ConfigError(
            f"flash_attn: {name} needs the package {PACKAGES[name]} and a GPU that it knows, and they are not there. "
            "Leave flash_attn out: PyTorch's own attention (sdpa) is nearly as fast, and training attends by Luthier's "
            "masks anyway."
        )
    return ATTENTION[name]


def _refuse_scratch_in_bits(method: str | None) -> None:
    if method is not None:
        raise ConfigError(f"train_from_scratch: random weights cannot be trained in few bits ({method}). Keep one.")


def _pretrained(
    config: ModelConfig,
    settings: PretrainedConfig,
    dtype: torch.dtype | None,
    attn: str | None,
    how: dict[str, Any],
) -> PreTrainedModel:
    from safetensors import SafetensorError

    name = config.model_name_or_path
    folder = model_folder(config)
    if folder is not None:
        manifest.check_weights("model_name_or_path", folder)
    try:
        model, info = auto_class(settings).from_pretrained(
            folder or name,
            config=settings,
            dtype="auto" if dtype is None else dtype,
            attn_implementation=attn,
            **how,
            trust_remote_code=config.trust_remote_code,
            ignore_mismatched_sizes=True,  # so that they are listed; they raise below
            output_loading_info=True,
            **hub(config),
        )
    except ImportError as error:
        raise ModelError(f"{name}: {error}") from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(no_source("model_name_or_path", name, folder, error)) from error
    _check_complete(name, model, info)
    return model


def _check_complete(name: str, model: PreTrainedModel, info: dict[str, Any]) -> None:
    # Buffers that the code computes may be absent from a file; a parameter may not.
    parameters = {key for key, _ in model.named_parameters()}
    if missing := sorted(parameters & set(info["missing_keys"])):
        raise ModelError(
            f"{name}: the weights lack {_some(missing)}, which would be random. The architecture in config.json is "
            f"{type(model).__name__}; is the folder complete, and is it that of a language model with its head?"
        )
    if wrong := sorted(info["mismatched_keys"]):
        shapes = [f"{key} (file {tuple(there)}, config.json {tuple(here)})" for key, there, here in wrong]
        raise ModelError(f"{name}: the weights do not fit config.json: {_some(shapes)}.")
    if unused := sorted(info["unexpected_keys"]):
        log.warning(
            "%s: %s has no place for the weights %s; they are not used.", name, type(model).__name__, _some(unused)
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _scratch(
    config: ModelConfig, settings: PretrainedConfig, dtype: torch.dtype | None, attn: str | None
) -> PreTrainedModel:
    import torch

    return auto_class(settings).from_config(
        settings, dtype=dtype or torch.float32, attn_implementation=attn, trust_remote_code=config.trust_remote_code
    )


def _mend_generation(model: PreTrainedModel) -> None:
    # Some published models (Llama 2) carry sampling values with do_sample off, which save_pretrained refuses.
    generation = model.generation_config
    if generation is None or generation.do_sample:
        return
    if any(value not in (None, default) for value, default in ((generation.temperature, 1.0), (generation.top_p, 1.0))):
        generation.do_sample = True
