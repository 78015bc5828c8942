"""AWQ (Lin et al. 2023, arXiv 2306.00978): needs text to calibrate with, so models are stored quantised."""

from __future__ import annotations

BITS = ()
"""A full model cannot be brought down while it is loaded."""
PACKAGES = {"gptqmodel": "gptqmodel"}
"""What must be installed: import name and what to ask pip for."""
ACCELERATOR = False
"""Whether it needs one."""
