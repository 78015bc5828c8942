"""The folder is the registry: a file in a family's folder is a YAML value of the same name.

`find("objectives", "sft")` imports `luthier.objectives.sft` and nothing else of the family, so that an optional
dependency of one member costs the others nothing. A user's own folder (`plugins: ./mine`) has the same
sub-folders; packages register through entry points of the group `luthier.FAMILY`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path
from types import ModuleType

from luthier.core.errors import ConfigError
from luthier.core.paths import is_folder, local

FAMILIES = (
    "objectives",
    "formats",
    "templates",
    "tool_formats",
    "heads",
    "adapters",
    "quant",
    "optim",
    "callbacks",
    "engines",
    "drafters",
    "scorers",
)

_HOME = Path(__file__).resolve().parent.parent
_plugins: list[Path] = []


def use_plugins(folder: str | Path) -> None:
    """Search a user's folder too. Its sub-folders are named as ours are; ours win a tie with an error."""
    path = local(folder)
    if not is_folder(path):
        raise ConfigError(f"plugins: {folder} is not a folder. Give a folder with sub-folders such as objectives/.")
    path = path.resolve()
    if path not in _plugins:
        _plugins.append(path)


def names(family: str) -> list[str]:
    """Every name in a family: the project's, the plugins' and the entry points'."""
    return sorted({*_files(family), *_entry_points(family).names})


def find(family: str, name: str) -> ModuleType:
    """Import one member of a family. A miss names the nearest; a broken file raises its own error."""
    if family not in FAMILIES:
        raise ValueError(f"no family named {family!r}; there are: {', '.join(FAMILIES)}")
    file = _files(family).get(name)
    if file is not None and file.is_relative_to(_HOME):
        return importlib.import_module(f"luthier.{family}.{name}")
    if file is not None:
        return _load_file(file, f"luthier_plugins.{family}.{name}")
    for point in _entry_points(family).select(name=name):
        return point.load()
    raise ConfigError(miss(family.rstrip("s"), name, names(family)))


def every(family: str) -> Iterator[ModuleType]:
    """All members of a family, in order of their names. Only for families that import nothing heavy."""
    for name in names(family):
        yield find(family, name)


def miss(kind: str, name: str, known: list[str]) -> str:
    """The message for a name that does not exist: the nearest, then all."""
    near = get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"There is no {kind} named {name!r}.{hint} There are: {', '.join(known)}."


@cache
def _entry_points(family: str) -> EntryPoints:
    # Every call reads the metadata of all installed packages.
    return entry_points(group=f"luthier.{family}")


def _files(family: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for root in (_HOME, *_plugins):
        for file in sorted((root / family).glob("*.py")):
            if file.stem.startswith("_"):
                continue
            if file.stem in found:
                raise ConfigError(f"{file} has the name of {found[file.stem]}; rename the plugin's file.")
            found[file.stem] = file
    return found


def _load_file(file: Path, module_name: str) -> ModuleType:
    if module_name in sys.modules and sys.modules[module_name].__file__ == str(file):
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module
