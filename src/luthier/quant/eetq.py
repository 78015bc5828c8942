"""EETQ: 8-bit weights, one scale per channel, by kernels of the Hugging Face hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from luthier.model.quantise import QuantConfig

BITS = (8,)
"""What a full model can be brought down to while it is loaded."""
PACKAGES = {"kernels": "kernels"}
"""What must be installed: import name and what to ask pip for."""
ACCELERATOR = True
"""Whether it needs one."""


def settings(config: QuantConfig, dtype: torch.dtype | None, *, sharded: bool) -> Any:
    """What transformers is told."""
    from transformers import EetqConfig

    return EetqConfig("int8")
