"""HQQ: half-quadratic quantisation without calibration data, 1 to 8 bits (Badri and Shaji 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from luthier.model.quantise import QuantConfig

BITS = (1, 2, 3, 4, 5, 6, 8)
"""What a full model can be brought down to while it is loaded."""
PACKAGES = {"hqq": "hqq"}
"""What must be installed: import name and what to ask pip for."""
ACCELERATOR = True
"""Whether it needs one."""


def settings(config: QuantConfig, dtype: torch.dtype | None, *, sharded: bool) -> Any:
    """What transformers is told; axis 0 is HQQ's more exact grouping, as in LLaMA-Factory."""
    from transformers import HqqConfig

    return HqqConfig(nbits=config.quantization_bit, axis=0)
