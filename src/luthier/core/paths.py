"""Paths as users write them: names that no file system takes, or homes of nobody, lie nowhere and are no defect."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def local(name: str | Path) -> Path:
    """A path with `~` filled in, as far as there is such a home."""
    path = Path(name)
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def user_cache() -> Path:
    """Luthier's folder in the user's cache: $XDG_CACHE_HOME/luthier, or ~/.cache/luthier."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "luthier"


def exists(path: Path) -> bool:
    """Whether something lies there."""
    return _asked(path, Path.exists)


def is_file(path: Path) -> bool:
    """Whether a file lies there."""
    return _asked(path, Path.is_file)


def is_folder(path: Path) -> bool:
    """Whether a folder lies there."""
    return _asked(path, Path.is_dir)


def _asked(path: Path, question) -> bool:
    try:
        return question(path)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False
