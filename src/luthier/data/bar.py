"""Bars for what takes long, where somebody is watching."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def bar(items: Iterable[T], what: str, total: int, worth: Callable[[T], int]) -> Iterator[T]:
    """The same items, with a bar while they are worked on; `worth` says how much of `total` each is."""
    if not (sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"):
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    look = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*look, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=total)
        for item in items:
            yield item
            shown.advance(task, worth(item))


def batch_bar(starts: range, what: str) -> Iterator[int]:
    """`range(0, count, size)`, with a bar that counts to `count`."""
    return bar(starts, what, starts.stop, lambda start: min(starts.step, starts.stop - start))
