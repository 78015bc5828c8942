"""What can go wrong, as a tree.

    LuthierError                the message is meant for the user; the CLI prints it and exits with 2
    +-- ConfigError             a key, a value or a combination in the configuration   (also ValueError)
    +-- DataError               a data set, a file or a row                            (also ValueError)
    +-- TemplateError           a chat template cannot render what it was given        (also ValueError)
    +-- ModelError              a folder that is no model, weights that do not fit     (also ValueError)
    +-- CheckpointError         a checkpoint that cannot be written or read            (also RuntimeError)
    +-- TrainingError           a run that cannot go on, such as a non-finite loss     (also RuntimeError)

A message says what is wrong (with the value), where (file, line, row), what was expected, and how to mend it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable


class LuthierError(Exception):
    """Base of every error whose message is written for the user."""


class ConfigError(LuthierError, ValueError):
    """The configuration cannot be run as it stands."""


def refuse_all(complaints: Iterable[str]) -> None:
    """Raise one ConfigError with every complaint on a line of its own, if there is any."""
    lines = list(complaints)
    if lines:
        raise ConfigError("\n".join(lines))


class DataError(LuthierError, ValueError):
    """A data set, a file or a row cannot be used."""


class TemplateError(LuthierError, ValueError):
    """A chat template cannot render the messages it was given."""


class ModelError(LuthierError, ValueError):
    """A model cannot be loaded or used as asked."""


class CheckpointError(LuthierError, RuntimeError):
    """A checkpoint cannot be written or read."""


class TrainingError(LuthierError, RuntimeError):
    """A run cannot go on; the last complete checkpoint is intact."""


DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
"""What a disk may answer that is no fault of the program."""


def mendable(error: Exception) -> str | None:
    """What to tell a user who can mend this; None for what is no user's mistake."""
    if isinstance(error, LuthierError):
        return str(error)
    if isinstance(error, OSError) and error.errno in DISK_TROUBLE:
        return f"{error.filename or 'a file'}: {error.strerror}. Free space or permissions there."
    return None
