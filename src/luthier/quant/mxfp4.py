"""MXFP4 checkpoints (gpt-oss): 4-bit floats that share a scale in blocks of 32. Unpacked while they are loaded."""

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
    from transformers import Mxfp4Config

    return Mxfp4Config(dequantize=True)
