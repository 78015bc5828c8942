"""What a process does that is one of several: who speaks when a run fails, and how the processes part.

torchrun, `accelerate launch` and `deepspeed` say in the environment which process this is (RANK, WORLD_SIZE). This
module imports nothing heavy: the command line asks it before anything else.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "NCCL remote process exited",
    "peer process likely died",
    "Timed out waiting",
)
"""What gloo and NCCL say when another process is gone."""
UNREACHED = ("connectFullMesh failed", "timed out connecting", "failed to connect")
"""What gloo says when processes of one run have heard of each other and cannot connect."""
SPOKEN = "luthier-first-failure"
_PR_SET_PDEATHSIG = 1


def started(environ: Mapping[str, str] | None = None) -> bool:
    """Whether a launcher started this process as one of its ranks."""
    known = os.environ if environ is None else environ
    return "RANK" in known and "WORLD_SIZE" in known


def rank() -> int:
    """This process's number, 0 where there is only one."""
    return int(os.environ.get("RANK", "0"))


def without_local_rank(argv: Iterable[str]) -> list[str]:
    """Arguments without the --local_rank=N that `deepspeed` and older launchers put in front of them.

    The same number is in LOCAL_RANK; where it is not, it is put there.
    """
    kept: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name not in ("--local_rank", "--local-rank"):
            kept.append(word)
            continue
        if not equals and words and words[0].lstrip("-").isdigit():
            value = words.pop(0)
        if value.isdigit():
            os.environ.setdefault("LOCAL_RANK", value)
    return kept


def speaks_first(code: int, environ: Mapping[str, str] | None = None) -> bool:
    """Whether this process is the first of its node to fail, and so the one to say why.

    torchrun gives every process of an attempt a file for its error, side by side; the first to fail leaves a mark
    there with its exit code. Without such a file every process speaks.
    """
    known = os.environ if environ is None else environ
    file = known.get("TORCHELASTIC_ERROR_FILE")
    if not file or not started(known):
        return True
    mark = Path(file).parent.parent / SPOKEN
    try:
        with mark.open("x", encoding="utf-8") as opened:
            opened.write(str(code))
    except FileExistsError:
        return False
    except OSError:
        # No place for the mark: better said twice than not at all.
        return True
    return True


def failed_first(logs: Path) -> int | None:
    """The exit code of the process that spoke first in the last attempt under a launcher's folder, if one did."""
    marks = sorted(logs.rglob(SPOKEN), key=lambda mark: mark.stat().st_mtime)
    return int(marks[-1].read_text(encoding="utf-8")) if marks else None


def guarded(main: Callable[[], int]) -> int:
    """Run a command as one of several processes; what it fails with is said once, by the first to fail.

    Returns its exit code, 1 for what is no user's mistake. In a process of its own, exceptions pass.
    """
    if not started():
        return main()
    try:
        return main()
    except Exception as error:
        if not speaks_first(1):
            return 1
        if any(sign in str(error) for sign in UNREACHED):
            print(
                f"error: rank {rank()} cannot connect to the other processes: {error}. Set GLOO_SOCKET_IFNAME (with "
                "GPUs also NCCL_SOCKET_IFNAME) on every node to the network interface that leads to the others; `ip "
                "-br addr` lists them.",
                file=sys.stderr,
            )
            return 1
        sign = next((sign for sign in LOST if sign in str(error)), None)
        if sign is not None:
            print(f"rank {rank()} stops, because another process is gone ({sign}).", file=sys.stderr)
            return 1
        print(f"rank {rank()}:", file=sys.stderr)
        traceback.print_exc()
        return 1


def follow_parent() -> None:
    """End (with a checkpoint) when the launcher is gone, instead of training on unseen. Linux only."""
    if not started() or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def parting() -> Iterator[None]:
    """Around a run: when it went well the processes end together, and their group is dissolved."""
    yield
    distributed = _distributed()
    if distributed is None:
        return
    # The first to end with 128 + n makes torchrun terminate the others; rank 0 may still be closing its trackers.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    distributed.barrier()
    distributed.destroy_process_group()


def leave(code: int) -> None:
    """End this process. After a failure beside others at once: their group would wait for them."""
    if code not in (0, 128 + signal.SIGTERM, 128 + signal.SIGINT) and _distributed() is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _distributed() -> ModuleType | None:
    """torch.distributed where a group of processes exists; torch is not imported to find out."""
    found = sys.modules.get("torch.distributed")
    return found if found is not None and found.is_available() and found.is_initialized() else None
