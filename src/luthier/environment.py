"""`luthier env`: what a report about a problem should say of the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from luthier import __version__
from luthier.commands import parse_command

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "pydantic", "omegaconf", "rich")


def facts() -> dict[str, str]:
    """Versions, devices and cores, in the order they are printed."""
    import torch

    found = {"luthier": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["cpu cores"] = str(os.cpu_count())
    found["cpu vector"] = torch.backends.cpu.get_cpu_capability()
    found["accelerator"] = _accelerators()
    return found


def _accelerators() -> str:
    import torch

    if not torch.accelerator.is_available():
        return "none"
    kind = torch.accelerator.current_accelerator()
    if kind is not None and kind.type == "cuda":
        return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return f"{torch.accelerator.device_count()} x {kind}"


def main(argv: Sequence[str]) -> int:
    """`luthier env`."""
    parse_command(argv, "env")
    found = facts()
    width = max(map(len, found))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in found.items()))
    return 0
