"""Quanto: weights in 2, 4 or 8 bits, without calibration data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from luthier.model.quantise import QuantConfig

BITS = (2, 4, 8)
"""What a full model can be brought down to while it is loaded."""
PACKAGES = {"optimum.quanto": "optimum-quanto"}
"""What must be installed: import name and what to ask pip for."""
ACCELERATOR = False
"""Whether it needs one."""


def settings(config: QuantConfig, dtype: torch.dtype | None, *, sharded: bool) -> Any:
    """What transformers is told."""
    from transformers import QuantoConfig

    return QuantoConfig(weights=f"int{config.quantization_bit}")
