"""A causal language model from a folder or from the Hugging Face hub, complete or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luthier.core import manifest
from luthier.core.errors import ConfigError, ModelError
from luthier.core.log import get_logger
from luthier.model import quantise, rope
from luthier.model.quantise import QuantConfig
from luthier.model.source import ModelConfig, auto_class, hub, model_folder, no_source, read_settings

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
