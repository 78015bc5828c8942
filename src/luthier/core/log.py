"""What Luthier says on the terminal: to stderr, from rank 0 only, through the standard `logging` module."""

from __future__ import annotations

import logging
import os
import sys

LEVELS = {"DEBUG": logging.DEBUG, "INFO": logging.INFO, "WARN": logging.WARNING, "WARNING": logging.WARNING,
          "ERROR": logging.ERROR, "CRITICAL": logging.CRITICAL}  # fmt: skip


def get_logger(name: str = "luthier") -> logging.Logger:
    """A logger below `luthier`; the command line gives that root its handler."""
    return logging.getLogger(name if name.startswith("luthier") else f"luthier.{name}")


class _Stderr(logging.StreamHandler):
    """Writes to whatever `sys.stderr` is at the time: a notebook or a test may have exchanged it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):  # type: ignore[override]
        return sys.stderr


def set_up(level: int | None = None) -> None:
    """Send Luthier's messages to stderr. Ranks above 0 say only what is an error: all ranks would say the same.

    level: the least severe message that is shown; unset, what LLAMAFACTORY_VERBOSITY says, or INFO.
    """
    if level is None:
        level = LEVELS.get(os.environ.get("LLAMAFACTORY_VERBOSITY", "").strip().upper(), logging.INFO)
    # On import it warns of an optional CPU kernel that most machines lack.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    root = logging.getLogger("luthier")
    if not root.handlers:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("%(message)s"))
        root.addHandler(handler)
        root.propagate = False
    root.setLevel(level if int(os.environ.get("RANK", "0")) == 0 else logging.ERROR)


def quiet_libraries() -> None:
    """Keep the libraries' bars and deprecation notices out of ours; downloads still show their progress."""
    import warnings

    from transformers.utils import logging as theirs

    theirs.set_tqdm_hook(lambda factory, args, kwargs: factory(*args, **(kwargs | {"disable": True})))
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    if int(os.environ.get("RANK", "0")) > 0:
        # All processes would say the same.
        theirs.set_verbosity_error()
        warnings.simplefilter("ignore")
