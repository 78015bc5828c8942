"""What a saved folder holds, written beside it: the size and SHA-256 of every file, so that damage is found by name.

A disk that was full, a copy that broke off, a bit that turned: weights that changed after they were saved still load.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.core.errors import ModelError

NAME = "manifest.json"

WEIGHTS = ".safetensors"
"""How files end that nobody edits by hand."""


def seal(folder: Path, **facts: Any) -> None:
    """Flush every file of a folder to the disk, and write down what each is. facts: stand in the manifest too.

    What is hashed is read back, not what was meant to be written.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    listed = {path.relative_to(folder).as_posix(): _facts(path) for path in files}
    file = folder / NAME
    file.write_text(json.dumps({**facts, "files": listed}, indent=1) + "\n", encoding="utf-8")
    for path in (file, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        flush(path)


def read(folder: str | Path) -> dict[str, Any] | None:
    """A folder's manifest; None where there is none, as in folders of other tools. Raises ValueError for half a one."""
    file = Path(folder) / NAME
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict):
        raise ValueError("it lists no files")
    # Other tools write files of this name too.
    return found if all(_is_ours(facts) for facts in found["files"].values()) else None


def _is_ours(facts: Any) -> bool:
    return isinstance(facts, dict) and {"size", "sha256"} <= set(facts)


def damage(folder: str | Path, *, weights_only: bool = False, contents: bool = True) -> str | None:
    """The first file that is not as it was saved and what is wrong with it; None where all is well.

    weights_only: leave out what people may edit, such as config.json, and what only a continued run reads.
    contents: hash what is there, which reads it whole; otherwise only sizes are compared.
    """
    folder = Path(folder)
    try:
        found = read(folder)
    except (ValueError, OSError) as error:
        return f"{NAME} cannot be read ({error})"
    if found is None:
        return None
    for name, facts in found["files"].items():
        if weights_only and not name.endswith(WEIGHTS):
            continue
        if wrong := _wrong(folder / name, facts, contents):
            return f"{name} {wrong}"
    return None


def check_weights(key: str, folder: Path) -> None:
    """Raise ModelError if weights in `folder` are not as they were saved. key: who named the folder."""
    wrong = damage(folder, weights_only=True)
    if wrong is None:
        return
    raise ModelError(
        f"{key}: {folder} is damaged: {wrong}. Use another checkpoint or a copy of this one. If the file was changed "
        f"on purpose, remove {folder / NAME}."
    )


def _wrong(path: Path, facts: Mapping[str, Any], contents: bool) -> str | None:
    try:
        size = path.stat().st_size
        if size != facts["size"]:
            return f"has {size:,} bytes instead of {facts['size']:,}"
        if contents and _digest(path) != facts["sha256"]:
            return "does not have the contents it was saved with"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return None


def _facts(path: Path) -> dict[str, Any]:
    flush(path)
    return {"size": path.stat().st_size, "sha256": _digest(path)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
