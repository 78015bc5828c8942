"""bitsandbytes: linear layers in 4 bits (Dettmers et al. 2023, arXiv 2305.14314) or 8 (LLM.int8, arXiv 2208.07339).

Weights are quantised while they are loaded; adapters train on top of them (QLoRA). CPUs do it too, slowly.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from luthier.model.quantise import QuantConfig

BITS = (4, 8)
"""What a full model can be brought down to while it is loaded."""
PACKAGES = {"bitsandbytes": "luthier[quant]"}
"""What must be installed: import name and what to ask pip for."""
ACCELERATOR = False
"""Whether it needs one."""


def settings(config: QuantConfig, dtype: torch.dtype | None, *, sharded: bool) -> Any:
    """What transformers is told. sharded: FSDP cuts weights into pieces, and can cut those of the model's own dtype."""
    from transformers import BitsAndBytesConfig

    # On a CPU each 8-bit product says that it rounds its input to float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if config.quantization_bit == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    formats = {} if dtype is None else {"bnb_4bit_compute_dtype": dtype}
    if sharded and dtype is not None:
        formats["bnb_4bit_quant_storage"] = dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization_type,
        bnb_4bit_use_double_quant=config.double_quantization,
        **formats,
    )


def for_training(model: nn.Module) -> None:
    """Keep 4-bit weights as they are on a CPU.

    Where the CPU has AVX-512 BF16, bitsandbytes repacks them at the first forward pass in evaluation mode, and the
    kernel for repacked weights has no backward pass: gradients would end at every layer, and nobody would be told.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
