"""Rows in, lines out: output files that hold one JSON object per input row and go on where they stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from luthier.core.errors import ConfigError, DataError
from luthier.core.log import get_logger

if TYPE_CHECKING:
    from luthier.core.types import Example

log = get_logger("rows")


def read_examples(path: Path, read: Callable[[Mapping[str, Any]], Example], *, expected: str) -> list[Example]:
    """Rows of a file as examples, by `read`. Raises DataError naming the row that cannot be used."""
    from luthier.data.files import open_source
    from luthier.data.source import BadRow, Source

    if not path.exists():
        raise DataError(f"--input: there is no file {path}.")
    examples: list[Example] = []
    for file in open_source(Source(name=path.name, place="--input", path=path)):
        for index, row in enumerate(file.take(range(len(file)))):
            try:
                examples.append(read(row))
            except BadRow as error:
                why = f"{error.reason} ({error.detail})" if error.detail else error.reason
                raise DataError(
                    f"{file.path}, row {file.number(index)}: {why}. Expected {expected}. Mend or remove the row; "
                    "nothing was answered."
                ) from None
    return examples


def make(output: Path) -> None:
    """Make sure that `output` can be written."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()
    except OSError as error:
        raise ConfigError(f"--output: {output} cannot be written: {error}.") from error


def resume(
    output: Path,
    asked: Mapping[int, Any],
    question: Callable[[Mapping[str, Any]], Any],
    *,
    holds: Iterable[str],
) -> set[int]:
    """Rows that `output` already answers; half a line that a killed run left at its end is taken off.

    asked: what is asked of each row; question: what a line says it was asked. holds: keys of every line. Raises
    DataError if the lines there answer something else.
    """
    take_off_half_line(output)
    done: set[int] = set()
    with output.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            line = _line(text, f"{output}, line {number}", set(holds))
            if line["row"] not in asked or question(line) != asked[line["row"]]:
                raise DataError(
                    f"{output}, line {number}: row {line['row']} there was asked something else than the input asks now"
                    " (another input, template, system prompt or choice). Give another --output, or remove the file."
                )
            done.add(line["row"])
    if done:
        log.info("%s holds %d answers; %d are left.", output, len(done), len(asked) - len(done))
    return done


def append(file: TextIO, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write lines; they are on disk when this returns."""
    for line in lines:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()
    os.fsync(file.fileno())


def take_off_half_line(output: Path) -> None:
    """Cut off what a killed run left of a line."""
    with output.open("rb+") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            file.truncate(whole)
            log.warning("%s ended in the middle of a line; that answer is made again.", output)


@contextmanager
def progress(total: int, doing: str) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, one line per window elsewhere; gives a function to be told how many more are done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from luthier.train.runlog import Clock, clock_time

    console, clock, done = Console(stderr=True), Clock(), 0
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(doing, total=total)

        def advance(more: int) -> None:
            nonlocal done
            done += more
            bar.update(task, completed=done)
            if not console.is_terminal:
                left = clock_time(clock.remaining(done, total) or 0)
                log.info("%s: %d of %d, %s left", doing, done, total, left)

        yield advance


def _line(text: str, place: str, holds: set[str]) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is not JSON ({error}); this is no file of answers. Give another --output.") from None
    if not isinstance(line, dict) or not holds <= line.keys():
        raise DataError(f"{place} is no answer ({', '.join(sorted(holds))}). Give another --output.")
    return line
