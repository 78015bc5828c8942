"""`trainer_log.jsonl`: one object a line about how a run goes, in LLaMA-Factory's words."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from luthier.core.log import get_logger

log = get_logger("log")

NAME = "trainer_log.jsonl"

_RENAMED = {"learning_rate": "lr", "tokens": "total_tokens", "tokens_per_second": "throughput"}
_ORDER = (
    "loss",
    "eval_loss",
    "lr",
    "epoch",
    "percentage",
    "elapsed_time",
    "remaining_time",
    "throughput",
    "total_tokens",
)


class Clock:
    """Time since training began in this process, and what the steps that are left will take at this pace."""

    def __init__(self, first_step: int = 0):
        self._began = time.monotonic()
        self._first_step = first_step

    def elapsed(self) -> float:
        """Seconds."""
        return time.monotonic() - self._began

    def remaining(self, step: int, total: int) -> float | None:
        """Seconds; None before the first step is done."""
        done = step - self._first_step
        return None if done <= 0 else self.elapsed() / done * max(0, total - step)


class RunLog:
    """The file. Lines after the step that a run resumes from are taken away, so that it has no gaps or doubles."""

    def __init__(self, folder: str | Path, *, resumed_step: int = 0):
        self.path = Path(folder) / NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = _lines_up_to(self.path, resumed_step) if resumed_step > 0 else []
        aside = self.path.with_name(NAME + ".tmp")
        with aside.open("w", encoding="utf-8") as file:
            file.writelines(_to_line(line) for line in kept)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self.path)
        self._size = self.path.stat().st_size
        self._waiting: list[bytes] = []

    def append(self, line: Mapping[str, object]) -> None:
        """Add one object; it is on its way to the disk when this returns.

        A disk that is full does not end the run: lines wait until there is room, and half a line is taken back.
        """
        first = not self._waiting
        self._waiting.append(_to_line(line).encode())
        try:
            with self.path.open("ab", buffering=0) as file:
                self._size = min(self._size, file.tell())
                file.truncate(self._size)
                data = b"".join(self._waiting)
                written = file.write(data)
                if written != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if first:
                log.warning("WARNING: %s cannot be written (%s). Its lines wait for the next try.", self.path, error)
            return
        self._size += len(data)
        self._waiting.clear()

    def entry(self, logs: Mapping[str, object], *, step: int, total: int, clock: Clock) -> dict[str, object]:
        """What the loop logged, as a line: the usual names first, then whatever the objective measured."""
        numbers = {_RENAMED.get(name, name): value for name, value in logs.items() if isinstance(value, int | float)}
        remaining = clock.remaining(step, total)
        known: dict[str, object] = numbers | {
            "percentage": round(step / total * 100, 2) if total else 100.0,
            "elapsed_time": clock_time(clock.elapsed()),
        }
        if remaining is not None:
            known["remaining_time"] = clock_time(remaining)
        first = {name: known[name] for name in _ORDER if name in known}
        return {"current_steps": step, "total_steps": total} | first | known


def clock_time(seconds: float) -> str:
    """Seconds as H:MM:SS."""
    return str(timedelta(seconds=int(seconds)))


def read(folder: str | Path) -> list[dict[str, object]]:
    """Every complete line of a run's log; empty where there is none."""
    path = Path(folder) / NAME
    return _lines_up_to(path, None) if path.exists() else []


def _lines_up_to(path: Path, step: int | None) -> list[dict]:
    if not path.exists():
        return []
    lines: list[dict] = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            # A killed run leaves half a line at the end; anywhere else somebody wrote into the file.
            log.warning("%s line %d is not JSON and is left out: %.60s", path, number, text)
            continue
        if step is None or line["current_steps"] <= step:
            lines.append(line)
    return lines


def _to_line(line: Mapping[str, object]) -> str:
    # JSON has no NaN or infinity; null is what readers of the file understand.
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    return json.dumps(clean) + "\n"
