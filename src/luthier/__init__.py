"""Luthier: fine-tune language models from one YAML file.

luthier.train("train.yaml", learning_rate=1e-4)      what `luthier train` does
luthier.resolve({"stage": "sft", ...})               the checked configuration, a `luthier.run.Run`
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from luthier import train

if TYPE_CHECKING:
    from luthier.fit import Result

__version__ = "0.1.0"
__all__ = ["__version__", "resolve", "train"]


class _Train(ModuleType):
    """`luthier.train` is a package and a verb: both want the name, so the package can be called."""

    def __call__(self, config: str | Path | Mapping[str, Any], **overrides: Any) -> Result:
        """Train from a YAML or JSON file, or a dict of keys, as `luthier train` does; overrides win over it."""
        from luthier.fit import fit
        from luthier.run import resolve

        return fit(resolve(config, [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]))


train.__class__ = _Train


def __getattr__(name: str) -> Any:
    """`resolve` is imported when it is first used, so that `import luthier` costs nothing."""
    if name == "resolve":
        return importlib.import_module("luthier.run").resolve
    raise AttributeError(f"module 'luthier' has no attribute {name!r}")
