"""FP8 checkpoints (DeepSeek-V3, Qwen3-FP8): 8-bit floats with a scale per block. Unpacked while they are loaded."""

from __future__ import annotations

from typing import Any

BITS = ()
"""A full model cannot be brought down while it is loaded."""
PACKAGES: dict[str, str] = {}
"""What must be installed: import name and what to ask pip for."""
ACCELERATOR = False
"""Whether it needs one."""


def unpack() -> Any:
    """What transformers is told, so that the model can be trained like any other."""
    from transformers import FineGrainedFP8Config

    return FineGrainedFP8Config(dequantize=True)
