"""Lock files, by which of several processes one does what all of them need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from logging import Logger
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout


@contextmanager
def locked(file: Path, log: Logger, busy: str, *, shared: bool = False) -> Iterator[bool]:
    """Hold a lock file; gives whether another process held it before, for which this one had to wait.

    busy: what the other is doing, said in the log while waiting. shared: for file systems that several machines share,
    where only the existence of the file can be relied on. Raises OSError where the file cannot be written.
    """
    lock: BaseFileLock = (SoftFileLock if shared else FileLock)(file)
    try:
        lock.acquire(timeout=0)
        waited = False
    except Timeout:
        log.info("Another process is %s; waiting for it.", busy)
        lock.acquire()
        waited = True
    try:
        yield waited
    finally:
        lock.release()
