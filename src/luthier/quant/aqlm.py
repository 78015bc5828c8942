"""AQLM (Egiazarian et al. 2024, arXiv 2401.06118): 2 bits by learnt codebooks; models are stored quantised."""

from __future__ import annotations

BITS = ()
"""A full model cannot be brought down while it is loaded."""
PACKAGES = {"aqlm": "aqlm[gpu,cpu]"}
"""What must be installed: import name and what to ask pip for."""
ACCELERATOR = False
"""Whether it needs one."""
