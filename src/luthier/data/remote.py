"""Files that lie in a cloud's storage (s3://, gs://, https:// ...), copied here once, through fsspec."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from secrets import token_hex
from typing import Any

from luthier.core.errors import DataError
from luthier.core.locks import locked
from luthier.core.log import get_logger

log = get_logger("data")


def fetched(url: str, place: str, folder: Path) -> Path:
    """A local copy of what lies at `url`, fetched again when the original changes, by one process for all. Raises
    DataError.

    folder: where copies are kept; each has a name made of the address and of what the storage says of its content.
    """
    import fsspec

    try:
        storage, path = fsspec.core.url_to_fs(url)
        told = hashlib.sha256(f"{url} {storage.ukey(path)}".encode()).hexdigest()[:20]
        copy = folder / f"{told}{Path(path).suffix}"
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f".{told}.lock", log, f"fetching {url}"):
            if not copy.is_file():
                _fetch(storage, path, copy)
                log.info("Fetched %s.", url)
    except ImportError as error:
        raise DataError(f"{place}: {url}: {error}. Install that package, or download the file and name it.") from None
    except Exception as error:
        raise DataError(f"{place}: {url} could not be fetched: {type(error).__name__}: {error}") from error
    return copy


def _fetch(storage: Any, path: str, copy: Path) -> None:
    """Copy a file so that it appears whole or not at all. The name it has meanwhile is nobody else's: where machines
    share the folder, their locks may not know of one another."""
    partial = copy.with_name(f".partial-{token_hex(8)}")
    try:
        storage.get_file(path, str(partial))
        os.replace(partial, copy)
    finally:
        partial.unlink(missing_ok=True)
