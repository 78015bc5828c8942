"""Answers to a file of prompts by speculative decoding, and what it saved.

luthier speculate CONFIG --input prompts.jsonl --output answers.jsonl [--compare] [key=value ...]

CONFIG is a YAML file with `draft`, or the folder that stage accept_head left behind. Each answer is a line {"row",
"prompt", "predict", "how", "ways"}. A row may say what is right: {"answer"} or {"target"}, a reference whose final
answer is looked for, or {"regex"}. With --compare each prompt is also answered without the accept head (lossless
speculation) and without drafts (plain greedy decoding), from empty caches. OUTPUT.summary.json adds all up. A run that
was interrupted goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.commands import parse_command
from luthier.core.log import get_logger
from luthier.infer import EXPECTED, Question, question_of
from luthier.infer import read_row as read_prompt
from luthier.resumable import append, make, progress, read_examples, resume

if TYPE_CHECKING:
    from luthier.core.types import Example
    from luthier.engines.sampling import GenerateConfig
    from luthier.run import Run
    from luthier.speculative import Fast, FastEngine

log = get_logger("speculate")

RIGHT = "right"
"""Key of `Example.extra`: the column that says what is right, and what it says."""
COLUMNS = ("regex", "answer", "target")
"""Columns that say what is right; the first that is there."""
LINES = 20
"""Lines of progress where there is no terminal."""

Way = Mapping[str, Any]
"""What one way of answering a prompt gave: predict, seconds, right, and the fields of `Tally`."""


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code."""
    from luthier.run import resolve
    from luthier.speculative import find_fast, greedy, load_fast

    command = parse_command(argv, "speculate")
    source, output = (Path(command.flags[flag]).expanduser() for flag in ("input", "output"))
    if isinstance(command.config, str):
        run = find_fast(command.config, command.overrides)
    else:
        run = resolve(command.config, command.overrides, verb="speculate")
    sampling = greedy(run)
    run.announce(log)
    examples = read_examples(source, read_row, expected=EXPECTED)
    make(output)
    fast = load_fast(run)
    questions = [question_of(row, example, fast.speaker) for row, example in enumerate(examples)]
    how = settings(run, fast, sampling, compare=command.flags["compare"])
    asked = {question.row: (question.prompt, how) for question in questions}
    done = resume(output, asked, lambda line: (line["prompt"], line["how"]), holds=("row", "prompt", "how", "ways"))
    left = [question for question in questions if question.row not in done]
    answer(ways_of(fast, compare=command.flags["compare"]), left, sampling, fast.speaker.renderer.stop_ids, output, how)
    with output.open(encoding="utf-8") as file:
        summary = how | summarise([json.loads(line)["ways"] for line in file])
    path = output.with_suffix(".summary.json")
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    show(summary)
    log.info("%d answers are in %s, what they add up to in %s.", len(questions), output, path)
    return 0


def read_row(row: Mapping[str, Any]) -> Example:
    """A row as `infer` reads it, with what is right in `extra`; raises BadRow."""
    from luthier.data.source import BadRow, excerpt

    example = read_prompt(row)
    column = next((name for name in COLUMNS if row.get(name) not in (None, "")), None)
    if column is None:
        return example
    try:
        checker(column, str(row[column]))
    except re.error as error:
        raise BadRow("regex is no regular expression", f"{error}: {excerpt(row[column])}") from None
    return replace(example, extra={**example.extra, RIGHT: (column, str(row[column]))})


def checker(column: str, wanted: str) -> Callable[[str], bool]:
    """Whether an answer is right. regex: it matches somewhere. answer, target: it comes to the same final answer."""
    from luthier.scorers._final import meets

    if column == "regex":
        pattern = re.compile(wanted)
        return lambda text: pattern.search(text) is not None
    return meets(wanted)


def settings(run: Run, fast: Fast, sampling: GenerateConfig, *, compare: bool) -> dict[str, Any]:
    """What decides the lines of the output; a run that goes on must not change it."""
    from luthier.model import heads
    from luthier.speculative import accept_folder

    folder = accept_folder(run)
    keys = ("draft", "draft_model", "draft_layers", "draft_tokens", "lookup_ngram", "lookup_min_ngram")
    return {
        "model_name_or_path": run.model.model_name_or_path,
        "model_revision": run.model.model_revision,
        "adapter_name_or_path": run.adapter.adapter_name_or_path,
        **{key: getattr(run.speculate, key) for key in keys},
        "accept_head": None if folder is None else str(folder),
        # A head that was trained again has other answers, in the same folder or not.
        "accept_head_digest": None if folder is None else heads.digest(folder),
        "threshold": None if fast.judge is None else fast.judge.threshold,
        "max_new_tokens": sampling.max_new_tokens,
        "max_length": sampling.max_length,
        "repetition_penalty": float(sampling.repetition_penalty),
        "compare": compare,
    }


def ways_of(fast: Fast, *, compare: bool) -> dict[str, FastEngine]:
    """The ways each prompt is answered, by name; the first is what was asked for."""
    ways = {"lossless" if fast.judge is None else "judge": fast.engine}
    if compare:
        ways |= {"lossless": fast.without(judge=True), "plain": fast.without(draft=True)}
    return ways


def answer(
    ways: Mapping[str, FastEngine],
    questions: Sequence[Question],
    sampling: GenerateConfig,
    stop_ids: Sequence[int],
    output: Path,
    how: Mapping[str, Any],
) -> None:
    """Answer questions in each of the ways and append a line for each; it is on disk before the next is asked."""
    step = max(1, len(questions) // LINES)
    with output.open("a", encoding="utf-8") as file, progress(len(questions), "answering") as advance:
        for nth, question in enumerate(questions, 1):
            found = {name: _way(engine, question, sampling, stop_ids, len(ways) > 1) for name, engine in ways.items()}
            main_way = next(iter(found.values()))
            append(file, [question.answered(main_way["predict"], {"how": dict(how), "ways": found})])
            if nth % step == 0 or nth == len(questions):
                advance(nth % step or step)


def _way(
    engine: FastEngine, question: Question, sampling: GenerateConfig, stop_ids: Sequence[int], alone: bool
) -> dict[str, Any]:
    """alone: nothing of earlier answers is remembered, so that no way profits from another."""
    if alone:
        engine.speculator.forget()
    before = time.perf_counter()
    (ids,) = engine.generate([question.ids], sampling, stop_ids)
    seconds = time.perf_counter() - before
    text = engine.text(ids, sampling)
    known = question.example.extra.get(RIGHT)
    right = {} if known is None else {"right": checker(*known)(text)}
    return {"predict": text, **right, "seconds": seconds, **asdict(engine.tally)}


def summarise(lines: Sequence[Mapping[str, Way]]) -> dict[str, Any]:
    """What the ways of all rows add up to: {"rows": ..., "judge": {...}, "lossless": {...}, "plain": {...}}."""
    found = {name: _total([line[name] for line in lines]) for name in (lines[0] if lines else {})}
    for name, total in found.items():
        for other in ("plain", "lossless"):
            if name != "plain" and name != other and other in found and found[other]["tokens_per_second"]:
                total[f"speed_over_{other}"] = total["tokens_per_second"] / found[other]["tokens_per_second"]
        if "plain" in found and name != "plain":
            same = [line[name]["predict"] == line["plain"]["predict"] for line in lines]
            total["same_as_plain"] = sum(same) / len(same)
    return {"rows": len(lines), **found}


def _total(ways: Sequence[Way]) -> dict[str, Any]:
    sums = {key: sum(way[key] for way in ways) for key in ways[0] if key not in ("predict", "right")}
    graded = [way["right"] for way in ways if "right" in way]
    return {
        **sums,
        "tokens_per_pass": _share(sums["tokens"], sums["passes"]),
        "acceptance": _share(sums["kept"], sums["drafted"]),
        "tokens_per_second": _share(sums["tokens"], sums["seconds"]),
        "graded": len(graded),
        "right": _share(sum(graded), len(graded)),
    }


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def show(summary: Mapping[str, Any]) -> None:
    """A table of the ways, to stderr."""
    from rich.console import Console
    from rich.table import Table

    ways = [name for name in WAYS if name in summary]
    table = Table(title=f"{summary['rows']} prompts, draft: {summary['draft']}", title_justify="left")
    table.add_column("")
    for name in ways:
        table.add_column(WAYS[name], justify="right")
    for title, (key, form) in MEASURES.items():
        values = [summary[name].get(key) for name in ways]
        if any(values):
            table.add_row(title, *(_cell(value, form) for value in values))
    Console(stderr=True).print(table)


WAYS = {"judge": "with accept head", "lossless": "lossless", "plain": "plain greedy"}
"""Columns of the table."""
MEASURES = {
    "tokens": ("tokens", "{:d}"),
    "passes of the model": ("passes", "{:d}"),
    "tokens per pass": ("tokens_per_pass", "{:.2f}"),
    "draft tokens": ("drafted", "{:d}"),
    "of them kept": ("acceptance", "{:.1%}"),
    "by the accept head": ("judged", "{:d}"),
    "seconds": ("seconds", "{:.1f}"),
    "tokens per second": ("tokens_per_second", "{:.1f}"),
    "speed over plain": ("speed_over_plain", "{:.2f}x"),
    "speed over lossless": ("speed_over_lossless", "{:.2f}x"),
    "same text as plain": ("same_as_plain", "{:.1%}"),
    "right": ("right", "{:.1%}"),
}
"""Rows of the table: the key of a way's total, and how it is written."""


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
