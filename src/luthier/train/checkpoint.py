"""Checkpoints that are complete or absent: written aside, flushed to disk, renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from luthier.core.errors import CheckpointError

PREFIX = "checkpoint-"
STATE = "trainer_state.json"
_ASIDE = ".partial-"


def complete(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [
        p for p in Path(output_dir).glob(f"{PREFIX}*") if p.name[len(PREFIX) :].isdigit() and (p / STATE).is_file()
    ]
    return sorted(found, key=lambda p: int(p.name[len(PREFIX) :]))


def aside(final: Path) -> Path:
    """Where a checkpoint is written before it is renamed to `final`."""
    return final.parent / f"{_ASIDE}{final.name}"


def sweep(output_dir: str | Path) -> None:
    """Remove what an interrupted run left half-written."""
    for leftover in Path(output_dir).glob(f"{_ASIDE}*"):
        shutil.rmtree(leftover)


def publish_into(staged: Path, folder: Path) -> None:
    """Flush staged files to disk and move them into a folder that may hold others, each in one step."""
    _flush_all(staged)
    for file in sorted(staged.iterdir()):
        os.replace(file, folder / file.name)
    staged.rmdir()
    _flush(folder)


def publish(staged: Path, final: Path) -> None:
    """Flush a staged checkpoint to disk and give it its name; replaces an older one of the same step."""
    _flush_all(staged)
    if final.exists():
        # A resumed run that stops and saves at the step it resumed from.
        old = final.with_name(f"{_ASIDE}old-{final.name}")
        final.rename(old)
        staged.rename(final)
        shutil.rmtree(old)
    else:
        staged.rename(final)
    _flush(final.parent)


def _flush_all(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            _flush(file)
    _flush(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def guarded(staged: Path, what: str) -> Iterator[None]:
    """Turn a failed write into one clear message, with the half-written files removed.

    torch and safetensors report a full disk as RuntimeError or as an error type of their own, so everything that is
    raised while writing counts.
    """
    try:
        yield
    except Exception as error:
        shutil.rmtree(staged, ignore_errors=True)
        last = complete(staged.parent)
        kept = f"The last complete one is {last[-1]}." if last else "There is no earlier checkpoint."
        free = shutil.disk_usage(staged.parent).free if staged.parent.exists() else 0
        raise CheckpointError(
            f"Could not write {what} to {staged.parent}: {error}. {free / 2**20:,.0f} MiB are free there. {kept} "
            "Free some space (or set save_total_limit, save_only_model: true) and start the same command again."
        ) from error
