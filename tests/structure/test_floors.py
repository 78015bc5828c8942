"""Who may import whom, read from the source: downwards only, and no member of a family imports another.

core < data, formats, templates, tool_formats | model, adapters, heads, quant < objectives
     < train, callbacks, optim | engines, drafters, scorers, evaluate < verbs (the modules at the top), serve
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.core.registry import FAMILIES

SRC = Path(__file__).resolve().parents[2] / "src"

# folder -> (floor, side of the floor). The two sides of one floor never import each other.
ROOMS = {
    "core": (0, ""),
    "data": (1, "data"),
    "formats": (1, "data"),
    "templates": (1, "data"),
    "tool_formats": (1, "data"),
    "model": (1, "model"),
    "adapters": (1, "model"),
    "heads": (1, "model"),
    "quant": (1, "model"),
    "objectives": (2, ""),
    "train": (3, "train"),
    "callbacks": (3, "train"),
    "optim": (3, "train"),
    "engines": (3, "engines"),
    "drafters": (3, "engines"),
    "scorers": (3, "engines"),
    "evaluate": (3, "engines"),
    "serve": (4, ""),
}
TOP = (4, "")
FACTS = {"__version__"}
"""Names of the package itself that everybody may read."""
NAMED_IN_ANNOTATIONS = {"luthier.run"}
"""`Run` is made of every part's keys and so stands at the top, but annotations below may name it."""
NOT_A_MEMBER = {"luthier.engines.sampling", "luthier.engines.target"}
"""How text is drawn, the keys that every engine obeys, and the model with a cache: no engines themselves."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for file in sorted((SRC / "luthier").rglob("*.py")):
        parts = file.relative_to(SRC).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def room(module: str) -> tuple[int, str]:
    """Floor and side of a module; a module at the top of the package is a verb."""
    parts = module.split(".")
    return ROOMS.get(parts[1], TOP) if len(parts) > 1 else TOP


def imports(module: str, source: str, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module of ours) for each import anywhere in a file, also inside functions and type-checking blocks."""
    tree = ast.parse(source)
    annotations = {id(node) for block in ast.walk(tree) if _is_type_checking(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "luthier")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if module in PACKAGES else module.split(".")[:-1]
                base = ".".join(package[: len(package) - node.level + 1] + ([base] if base else []))
            if base.split(".")[0] != "luthier":
                continue
            for alias in node.names:
                if base == "luthier" and alias.name in FACTS:
                    continue
                if base in NAMED_IN_ANNOTATIONS and id(node) in annotations:
                    continue
                yield node.lineno, f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


PACKAGES = {name for name, file in modules().items() if file.name == "__init__.py"}


def wrongs(module: str, source: str, known: set[str]) -> list[str]:
    """What a file imports that it may not."""
    floor, side = room(module)
    found = []
    for line, target in imports(module, source, known):
        other_floor, other_side = room(target)
        family = module.split(".")[1] if module.count(".") > 1 else ""
        if other_floor > floor:
            found.append(f"{module}:{line} imports {target}, which lives above it")
        elif other_floor == floor and other_side != side:
            found.append(f"{module}:{line} imports {target}, from the other side of its floor")
        elif family in FAMILIES and target.startswith(f"luthier.{family}.") and _members(module, target):
            found.append(f"{module}:{line} imports {target}, another member of its family")
    return found


def _members(module: str, target: str) -> bool:
    # A file whose name begins with an underscore is no member: the registry does not offer it.
    return target != module and not target.split(".")[2].startswith("_") and target not in NOT_A_MEMBER


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_downwards(module):
    known = set(modules())
    assert wrongs(module, modules()[module].read_text(), known) == []


def test_every_folder_has_a_room():
    folders = {p.name for p in (SRC / "luthier").iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert folders <= set(ROOMS), "give the new folder a floor in ROOMS and in docs/architecture.md"


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("luthier.core.tree", "from luthier.data.layout import Layout", "above"),
        ("luthier.data.mix", "def f():\n    import luthier.objectives.sft", "above"),
        ("luthier.data.mix", "from luthier.model import policy", "other side"),
        ("luthier.model.load", "from ..formats import alpaca", "other side"),
        ("luthier.engines.hf", "from luthier.train.trainer import Trainer", "other side"),
        ("luthier.objectives.dpo", "from luthier.objectives.sft import Sft", "family"),
        ("luthier.objectives.dpo", "from luthier import fit", "above"),
        ("luthier.train.trainer", "from luthier.cli import main", "above"),
        ("luthier.train.trainer", "from luthier.run import Run", "above"),
    ],
)
def test_a_wrong_import_is_seen(module, source, complaint):
    found = wrongs(module, source, set(modules()) | {"luthier.fit", "luthier.model.policy", "luthier.formats.alpaca"})
    assert len(found) == 1 and complaint in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("luthier.data.mix", "from luthier.core.types import Example\nfrom luthier import __version__"),
        ("luthier.objectives.dpo", "from luthier.model.policy import Policy\nfrom luthier.data.truncate import f"),
        ("luthier.objectives.dpo", "from luthier.objectives._pairs import f"),
        ("luthier.cli", "from luthier.serve import api"),
        ("luthier.train.trainer", "if TYPE_CHECKING:\n    from luthier.run import Run"),
        ("luthier.model.load", "from luthier.adapters import lora\nimport torch.data"),
    ],
)
def test_a_right_import_is_let_be(module, source):
    assert wrongs(module, source, set(modules())) == []
