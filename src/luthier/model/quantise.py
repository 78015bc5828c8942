"""Base models in few bits: which keys ask for it, what can go together, and what a stored model already is.

How each method is told to transformers stands in `quant/METHOD.py`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from luthier.core.errors import ConfigError
from luthier.core.registry import find, miss, names

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

STORED = {"bitsandbytes": "bnb"}
"""Names that transformers writes into config.json, and older versions of LLaMA-Factory read, by those of now."""


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """A base model in few bits, so that adapters of large models fit (QLoRA)."""

    quantization_bit: int | None = None
    """Bring the base model's linear layers down to so many bits while it is loaded: 4 or 8 with bnb. Unset: leave it as
    it is; models that are stored quantised need no key."""
    quantization_method: str = "bnb"
    """How: the name of a file in quant/, such as bnb (or bitsandbytes, which is the same) or hqq."""
    quantization_type: Literal["nf4", "fp4"] = "nf4"
    """Kind of 4-bit number of bnb: nf4 suits weights, which are distributed normally."""
    double_quantization: bool = True
    """Quantise the scales of 4-bit blocks too (bnb), which saves 0.4 bits a weight."""
    quantization_device_map: Literal["auto"] | None = None
    """auto: spread a 4-bit model over all accelerators of this process, to use it; unset: one device."""

    def __post_init__(self) -> None:
        if self.method not in names("quant"):
            raise ConfigError(f"quantization_method: {miss('method', self.quantization_method, names('quant'))}")
        method, bits = find("quant", self.method), self.quantization_bit
        if bits is not None and bits not in method.BITS:
            raise ConfigError(f"quantization_bit: {self._wrong_bits(method, bits)}")
        if self.quantization_device_map is not None and bits != 4:
            raise ConfigError("quantization_device_map: auto is for 4-bit models; it needs quantization_bit: 4.")

    @property
    def method(self) -> str:
        """The file in quant/ that is meant."""
        return STORED.get(self.quantization_method, self.quantization_method)

    def check(self) -> None:
        """Raise ConfigError where what the run asks for is not installed, before data are read."""
        if self.quantization_bit is not None:
            _check_installed(find("quant", self.method), self.method)

    def _wrong_bits(self, method: ModuleType, bits: int) -> str:
        name = self.method
        if method.BITS:
            return f"{name} keeps {_one_of(method.BITS)} bits, and {bits} were asked for."
        able = [other for other in names("quant") if find("quant", other).BITS]
        return (
            f"{name} cannot quantise a model while it is loaded. Name a model that is stored as {name} in "
            f"model_name_or_path and leave quantization_bit out, or choose quantization_method: {_one_of(able)}."
        )


def stored_as(settings: PretrainedConfig) -> str | None:
    """The quantization_method a checkpoint was stored with, by its config.json; None for a full model."""
    found = vars(settings).get("quantization_config")
    if found is None:
        return None
    facts = found if isinstance(found, Mapping) else found.to_dict()
    # Old bitsandbytes checkpoints name no method.
    name = facts.get("quant_method") or "bitsandbytes"
    name = str(name.value if isinstance(name, Enum) else name)
    return STORED.get(name, name)


def quantised(model: PreTrainedModel) -> bool:
    """Whether a loaded model's weights are in few bits, so that nothing can be merged into them."""
    return stored_as(model.config) is not None


def prepare_training(model: PreTrainedModel) -> None:
    """Let the method do to a quantised model what training on top of it needs: `for_training` of its file in quant/."""
    name = stored_as(model.config)
    prepares = vars(find("quant", name)).get("for_training") if name in names("quant") else None
    if prepares is not None:
        prepares(model)


def loading(
    config: QuantConfig, settings: PretrainedConfig, dtype: torch.dtype | None, *, sharded: bool
) -> tuple[Any, str | None]:
    """(what transformers is told, None where the checkpoint says it all; the method, None for a full model).

    sharded: FSDP or ZeRO-3 will cut the weights. Raises ConfigError for what is not installed or does not fit.
    """
    stored = stored_as(settings)
    if stored is not None:
        return _of_stored(config, stored)
    if config.quantization_bit is None:
        return None, None
    if sharded and config.quantization_bit != 4:
        raise ConfigError("quantization_bit: sharded training (FSDP, ZeRO-3) takes 4 bits; 8 only one process each.")
    config.check()
    return find("quant", config.method).settings(config, dtype, sharded=sharded), config.method


def placement(config: QuantConfig, device: Any, *, sharded: bool) -> Any:
    """`device_map` of a quantised model: it is made where it will stay."""
    import torch

    if config.quantization_device_map is not None:
        return config.quantization_device_map
    if sharded or device is None or torch.device(device).type == "cpu":
        return None
    return {"": torch.device(device)}


def _of_stored(config: QuantConfig, stored: str) -> tuple[Any, str | None]:
    if config.quantization_bit is not None:
        raise ConfigError(
            f"quantization_bit: the model is stored quantised already ({stored}). Leave quantization_bit out, or name "
            "the full model."
        )
    if stored not in names("quant"):
        return None, stored  # transformers knows more methods than LLaMA-Factory's keys do, and says what it needs
    method = find("quant", stored)
    _check_installed(method, stored)
    unpack = vars(method).get("unpack")
    return (unpack(), None) if unpack is not None else (None, stored)


def _check_installed(method: ModuleType, name: str) -> None:
    import torch

    missing = [package for module, package in method.PACKAGES.items() if not _importable(module)]
    if missing:
        raise ConfigError(
            f"quantization_method: {name} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} "
            f"not installed: pip install {' '.join(missing)}"
        )
    if method.ACCELERATOR and not torch.accelerator.is_available():
        raise ConfigError(f"quantization_method: {name} needs an accelerator, and there is none. On a CPU, bnb works.")


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def _one_of(values: tuple[int, ...] | list[str]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
