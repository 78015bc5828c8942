"""Lock files, by which of several processes one does what all of them need."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from logging import Logger
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

_HELD: set[int] = set()


def _let_go() -> None:
    for held in _HELD:
        os.close(held)
    _HELD.clear()


# What a process that is killed leaves behind, such as one that loads data, must not go on holding its folders.
os.register_at_fork(after_in_child=_let_go)


@contextmanager
def alone(folder: Path, *, patience: float) -> Iterator[bool]:
    """Hold a folder until the block or the process ends, however it ends; no file is written.

    Gives False where another process holds it for longer than `patience` seconds, and True also on file systems that
    cannot tell, as folders on NFS cannot.
    """
    held = os.open(folder, os.O_RDONLY)
    _HELD.add(held)
    try:
        yield _lock(held, time.monotonic() + patience)
    finally:
        _HELD.discard(held)
        os.close(held)


def _lock(held: int, until: float) -> bool:
    import fcntl

    while True:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


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
