"""Checkpoints that are complete or absent: written aside, flushed to disk with a manifest, renamed.

Names in an output folder:

    checkpoint-N             complete
    .partial-checkpoint-N    being written; what is left of one is removed at the next start
    .replaced-checkpoint-N   of a line of training that was begun anew; removed when the next checkpoint is complete
    damaged-checkpoint-N     not as it was written; kept, for the user to look at or remove
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from luthier.core import manifest
from luthier.core.errors import CheckpointError
from luthier.core.log import get_logger

log = get_logger("train")

PREFIX = "checkpoint-"
STATE = "trainer_state.json"
_ASIDE = ".partial-"
_OLD = ".partial-old-"
_REPLACED = ".replaced-"
_DAMAGED = "damaged-"
_WRITERS = ("(os error ", "inline_container", "PytorchStreamWriter", "iostream error", "Parent directory")
"""What libraries say of a file that cannot be written, in errors of other types than OSError."""


def step_of(folder: Path) -> int:
    """N of a checkpoint-N folder."""
    return int(folder.name.rpartition("-")[2])


def step_in(folder: Path) -> int:
    """The step a checkpoint was saved after, whatever its folder is called."""
    return int(json.loads((folder / STATE).read_text(encoding="utf-8"))["global_step"])


def complete(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = Path(output_dir).glob(f"{PREFIX}*")
    return sorted((p for p in found if p.name[len(PREFIX) :].isdigit() and (p / STATE).is_file()), key=step_of)


def last_whole(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that is as it was written. A damaged one is named in a warning and set aside."""
    found = complete(output_dir)
    for before, folder in reversed(list(enumerate(found))):
        wrong = manifest.damage(folder)
        if wrong is None:
            return folder
        kept = folder.with_name(_DAMAGED + folder.name)
        with contextlib.suppress(OSError):  # what cannot be renamed can still be passed over
            if kept.exists():
                shutil.rmtree(kept)
            folder.rename(kept)
        where = f"; it is kept as {kept.name}" if kept.exists() else ""
        then = f"The checkpoint before it is {found[before - 1].name}" if before else "There is no checkpoint before it"
        log.warning("WARNING: %s is damaged: %s. %s%s.", folder, wrong, then, where)
    return None


def aside(final: Path) -> Path:
    """Where a checkpoint is written before it is renamed to `final`."""
    return final.parent / f"{_ASIDE}{final.name}"


def sweep(output_dir: str | Path) -> None:
    """Remove what an interrupted run left half-written; finish what only had to be moved into place."""
    folder = Path(output_dir)
    for leftover in folder.glob(f"{_ASIDE}*"):
        final = folder / leftover.name.removeprefix(_OLD)
        if leftover == aside(folder / "model") and (leftover / manifest.NAME).is_file():
            _move_into(leftover, folder)
        elif final.name.startswith(PREFIX) and not final.exists() and manifest.damage(leftover) is None:
            leftover.rename(final)  # it was to be replaced by a newer one of its name, which never came
        else:
            shutil.rmtree(leftover)


def set_aside(output_dir: str | Path, *, after: int = 0) -> None:
    """Checkpoints of later steps than `after` belong to a line of training that this run does not go on with.

    They are renamed, and removed by `forget` as soon as this run has a checkpoint of its own.
    """
    for folder in complete(output_dir):
        if step_of(folder) > after:
            hidden = folder.with_name(_REPLACED + folder.name)
            if hidden.exists():
                shutil.rmtree(hidden)
            folder.rename(hidden)


def forget(output_dir: str | Path) -> None:
    """Remove what `set_aside` put aside."""
    for folder in Path(output_dir).glob(f"{_REPLACED}*"):
        shutil.rmtree(folder, ignore_errors=True)


def publish_into(staged: Path, folder: Path) -> None:
    """Flush staged files to disk and move them into a folder that may hold others.

    Once the manifest is there, `sweep` finishes what a killed run did not.
    """
    manifest.seal(staged)
    _move_into(staged, folder)


def _move_into(staged: Path, folder: Path) -> None:
    for path in sorted(staged.iterdir(), key=lambda path: path.name == manifest.NAME):
        goal = folder / path.name
        if path.is_dir() and goal.is_dir():
            shutil.rmtree(goal)
        os.replace(path, goal)
    staged.rmdir()
    manifest.flush(folder)


def publish(staged: Path, final: Path) -> None:
    """Flush a staged checkpoint to disk and give it its name; replaces an older one of the same step."""
    manifest.seal(staged, step=step_of(final))
    if final.exists():
        # A resumed run that stops and saves at the step it resumed from.
        old = final.with_name(_OLD + final.name)
        final.rename(old)
        staged.rename(final)
        shutil.rmtree(old)
    else:
        staged.rename(final)
    manifest.flush(final.parent)


def rotate(output_dir: str | Path, newest: Path, *, keep: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints until `keep` are left; never `newest`, which must be whole, nor the best.

    Those that an abandoned line of training left go too.
    """
    if wrong := manifest.damage(newest, contents=False):
        log.warning("WARNING: %s was just written and %s. Older checkpoints are kept.", newest, wrong)
        return
    forget(output_dir)
    if keep is None:
        return
    protected = {newest.name, Path(best).name if best else newest.name}
    found = complete(output_dir)
    spare = [folder for folder in found if folder.name not in protected]
    for folder in spare[: max(0, len(found) - max(keep, len(protected)))]:
        # First out of sight, so that a kill in between leaves no checkpoint with half its files.
        going = aside(folder.with_name(f"gone-{folder.name}"))
        try:
            folder.rename(going)
        except OSError as error:
            log.warning("WARNING: %s is one too many for save_total_limit and cannot be removed: %s.", folder, error)
        discard(going)


def is_write_error(error: BaseException) -> bool:
    """Whether this is about a disk and not about the program."""
    if isinstance(error, OSError | SafetensorError):
        return True
    if isinstance(error, CheckpointError):
        return False
    # tokenizers raises a bare Exception with what the system said.
    return any(sign in str(error) for sign in _WRITERS)


def discard(staged: Path) -> None:
    """Remove what was half written."""
    shutil.rmtree(staged, ignore_errors=True)


def in_words(error: BaseException | str, what: str, folder: Path) -> str:
    """Why `what` could not be written to `folder`, and what is there now."""
    last = complete(folder)
    kept = f"The last complete checkpoint is {last[-1]}." if last else "There is no earlier checkpoint."
    if isinstance(error, RuntimeError):
        error = f"a file could not be written to its end ({error})"
    free = shutil.disk_usage(folder).free if folder.exists() else 0
    return f"Could not write {what} to {folder}: {error}. {free / 2**20:,.0f} MiB are free there. {kept}"


@contextlib.contextmanager
def guarded(staged: Path, what: str) -> Iterator[None]:
    """Turn a failed write into one CheckpointError, with the half-written files removed."""
    try:
        yield
    except Exception as error:
        discard(staged)
        if not is_write_error(error):
            raise
        raise CheckpointError(
            f"{in_words(error, what, staged.parent)} Free some space (or set save_total_limit, save_only_model: true) "
            "and start the same command again."
        ) from error
