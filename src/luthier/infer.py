"""Answers to a file of prompts.

luthier infer CONFIG --input prompts.jsonl --output answers.jsonl [key=value ...]

Each answer is a line {"row", "prompt", "predict"} and "label" where the row brings the expected answer. A run that
was interrupted goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError, DataError, LuthierError
from luthier.core.log import get_logger

if TYPE_CHECKING:
    from luthier.core.types import Example
    from luthier.serving import Speaker

log = get_logger("infer")

_WINDOW = 4
"""Batches that are sorted by length together; their answers are written together, in order."""


@dataclass(frozen=True)
class Question:
    """A row of the input, ready for the model."""

    row: int
    """Place in the input, counted from 0."""
    ids: list[int]
    prompt: str
    """What the model is given, as text."""
    label: str | None

    def answered(self, predict: str) -> dict[str, Any]:
        """The line of the output."""
        line = {"row": self.row, "prompt": self.prompt, "predict": predict}
        return line if self.label is None else line | {"label": self.label}


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code."""
    from luthier.cli import parse_command
    from luthier.run import resolve
    from luthier.serving import load_engine

    command = parse_command(argv, "infer")
    source, output = (Path(command.flags[flag]).expanduser() for flag in ("input", "output"))
    run = resolve(command.config, command.overrides, verb="infer")
    for line in (*run.warnings, *run.notes):
        log.info("%s", line)
    examples = read_examples(source)
    _make(output)
    speaker = load_engine(run)
    questions = [_question(row, example, speaker) for row, example in enumerate(examples)]
    done = resume(output, questions)
    infer(speaker, run.generate, [question for question in questions if question.row not in done], output)
    log.info("%d answers are in %s.", len(questions), output)
    return 0


def read_examples(path: Path) -> list[Example]:
    """Rows of a file as examples. Raises DataError naming the row that cannot be used."""
    from luthier.core.registry import find
    from luthier.data.files import open_source
    from luthier.data.source import BadRow, Source

    if not path.exists():
        raise DataError(f"--input: there is no file {path}.")
    examples: list[Example] = []
    for file in open_source(Source(name=path.name, place="--input", path=path)):
        for index, row in enumerate(file.take(range(len(file)))):
            name, columns = _shape(row)
            try:
                examples.append(find("formats", name).read(row, columns))
            except BadRow as error:
                why = f"{error.reason} ({error.detail})" if error.detail else error.reason
                raise DataError(
                    f"{file.path}, row {file.number(index)}: {why}. Expected messages (role, content), or prompt, or "
                    "instruction and input. Mend or remove the row; nothing was answered."
                ) from None
    return examples


def infer(speaker: Speaker, sampling: Any, questions: Sequence[Question], output: Path) -> None:
    """Answer questions and append each answer to `output`; what is written is on disk before the next batch."""
    size = sampling.infer_batch_size * _WINDOW
    with output.open("a", encoding="utf-8") as file, _progress(len(questions)) as advance:
        for start in range(0, len(questions), size):
            window = questions[start : start + size]
            seeds = [_seed(speaker.seed, question.row) for question in window]
            answers = speaker.engine.generate(
                [question.ids for question in window], sampling, speaker.renderer.stop_ids, seeds=seeds
            )
            for question, ids in zip(window, answers):
                line = question.answered(speaker.engine.text(ids, sampling))
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            advance(len(window))


def resume(output: Path, questions: Sequence[Question]) -> set[int]:
    """Rows that `output` already answers; half a line that a killed run left at its end is taken off.

    Raises DataError if the answers there are to other prompts.
    """
    _take_off_half_line(output)
    prompts = {question.row: question.prompt for question in questions}
    done: set[int] = set()
    with output.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            line = _answer_line(text, f"{output}, line {number}")
            if prompts.get(line["row"]) != line["prompt"]:
                raise DataError(
                    f"{output}, line {number}: row {line['row']} there was asked something else than the input asks now"
                    " (another input, template or system prompt). Give another --output, or remove the file."
                )
            done.add(line["row"])
    if done:
        log.info("%s holds %d answers; %d are left.", output, len(done), len(questions) - len(done))
    return done


def _shape(row: Any) -> tuple[str, Any]:
    """The format of a row by its columns, and how that format is to read them."""
    from luthier.data.source import COLUMNS, TAGS, Columns

    if "messages" in row:
        roles = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
        tags = {**TAGS, **roles, "observation_tag": "tool"}
        return "sharegpt", Columns({**COLUMNS, "messages": "messages", "system": "system", "tools": "tools"}, tags)
    if "conversations" in row:
        return "sharegpt", Columns({**COLUMNS, "system": "system", "tools": "tools"})
    names = {**COLUMNS, "system": "system", "history": "history", "tools": "tools"}
    if "instruction" in row:
        return "alpaca", Columns(names)
    answer = next((name for name in ("response", "output", "label") if name in row), None)
    return "alpaca", Columns(
        {**names, "prompt": "text" if "text" in row else "prompt", "query": None, "response": answer}
    )


def _question(row: int, example: Example, speaker: Speaker) -> Question:
    try:
        ids = speaker.renderer.prompt(example.prompt, system=example.system, tools=example.tools)
    except LuthierError as error:
        raise DataError(f"--input, row {row + 1}: {error}") from error
    label = example.answers[0].messages[-1].content if example.answers else None
    prompt = speaker.engine.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Question(row, ids, prompt, label)


def _answer_line(text: str, place: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is not JSON ({error}); this is no file of answers. Give another --output.") from None
    if not isinstance(line, dict) or not {"row", "prompt", "predict"} <= line.keys():
        raise DataError(f"{place} is no answer (row, prompt, predict). Give another --output.")
    return line


def _take_off_half_line(output: Path) -> None:
    with output.open("rb+") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            file.truncate(whole)
            log.warning("%s ended in the middle of a line; that answer is made again.", output)


def _make(output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()
    except OSError as error:
        raise ConfigError(f"--output: {output} cannot be written: {error}.") from error


def _seed(seed: int, row: int) -> int:
    # Generators look at 32 bits; neighbouring runs must not share seeds with neighbouring rows.
    return (seed * 1_000_003 + row) % 2**32


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar on a terminal, one line per window elsewhere; gives a function to be told how many are done."""
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
    columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("answering", total=total)

        def advance(more: int) -> None:
            nonlocal done
            done += more
            bar.update(task, completed=done)
            if not console.is_terminal:
                log.info("%d/%d answered, %s left", done, total, clock_time(clock.remaining(done, total) or 0))

        yield advance
