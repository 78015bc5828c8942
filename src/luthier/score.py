"""What a reward model thinks of a file of prompts and answers.

luthier score CONFIG --input answers.jsonl --output scores.jsonl [key=value ...]

CONFIG is the YAML file of a reward model's training, or the folder it left behind. A row brings a prompt and one
answer or several: chosen and rejected, a ranked list, messages with the answer last, {prompt, response} or {prompt,
responses}. Each becomes a line {"row", "prompt", "answers": [{"text", "reward"}]}, answers in the row's order; a head
with two numbers says {"mean", "variance", "lcb"} instead. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.commands import parse_command
from luthier.core.errors import DataError, LuthierError
from luthier.core.log import get_logger
from luthier.resumable import append, make, progress, read_examples, resume

if TYPE_CHECKING:
    from luthier.core.types import Answer, Encoded, Example
    from luthier.data.source import Columns
    from luthier.engines.scoring import Judge

log = get_logger("score")

WINDOW = 4
"""Batches whose scores are written together."""
ANSWERS = ("responses", "response", "outputs", "output", "answers", "answer")
"""Columns an answer, or a list of them, may stand in; the first that is there."""
EXPECTED = (
    "a prompt (prompt, instruction and input, messages or conversations) with an answer: response, responses, output, "
    "chosen and rejected, or the conversation's last message"
)


@dataclass(frozen=True)
class Exam:
    """A row of the input, ready for the judge."""

    row: int
    """Place in the input, counted from 0."""
    encoded: Encoded
    prompt: str
    texts: list[str]
    known: list[float]
    """The scores the row brings, NaN where it brings none."""

    def line(self, said: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """The line of the output."""
        answers = [{"text": text, **what} for text, what in zip(self.texts, said)]
        line = {"row": self.row, "prompt": self.prompt, "answers": answers}
        return line | ({"truncated": self.encoded.truncated} if self.encoded.truncated else {})


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code."""
    from luthier.run import resolve
    from luthier.serving import find_run, load_judge

    command = parse_command(argv, "score")
    source, output = (Path(command.flags[flag]).expanduser() for flag in ("input", "output"))
    if isinstance(command.config, str):
        run = find_run(command.config, command.overrides, verb="score")
    else:
        run = resolve(command.config, command.overrides, verb="score")
    run.announce(log)
    examples = read_examples(source, read_row, expected=EXPECTED)
    make(output)
    judge = load_judge(run)
    exams = [_exam(row, example, judge) for row, example in enumerate(examples)]
    asked = {exam.row: (exam.prompt, exam.texts) for exam in exams}
    done = resume(output, asked, _asked, holds=("row", "prompt", "answers"))
    score(judge, [exam for exam in exams if exam.row not in done], output, run.score.score_batch_size)
    cut = sum(bool(exam.encoded.truncated) for exam in exams)
    if cut:
        log.warning('%d rows were cut to cutoff_len %d, see "truncated".', cut, run.layout.cutoff_len)
    log.info("%d rows are scored in %s.", len(exams), output)
    return 0


def score(judge: Judge, exams: Sequence[Exam], output: Path, size: int) -> None:
    """Score rows and append them to `output`; what is written is on disk before the next batches."""
    from luthier.engines.scoring import worth

    pairs, right = 0, 0
    with output.open("a", encoding="utf-8") as file, progress(len(exams), "scoring") as advance:
        for start in range(0, len(exams), size * WINDOW):
            window = exams[start : start + size * WINDOW]
            judged = judge.judge([exam.encoded for exam in window])
            append(file, (exam.line(said) for exam, said in zip(window, judged)))
            for exam, said in zip(window, judged):
                gaps = _gaps(exam.known, [worth(what) for what in said])
                pairs, right = pairs + len(gaps), right + sum(gap > 0 for gap in gaps)
            advance(len(window))
    if pairs:
        log.info("Of %d pairs with a known order, %.1f %% are scored in that order.", pairs, 100 * right / pairs)


def read_row(row: Mapping[str, Any]) -> Example:
    """A row as an example, its answers in the row's own order; raises BadRow."""
    from luthier.core.registry import find
    from luthier.data.source import COLUMNS, BadRow, Columns

    names = {**COLUMNS, **{name: name for name in ("history", "system", "tools", "chosen", "rejected")}}
    ranking = "chosen" in row and "rejected" in row
    for column, style in (("messages", "openai"), ("conversations", "sharegpt")):
        if column in row:
            example = find("formats", style).read(row, Columns({**names, "messages": column}, ranking=ranking))
            break
    else:
        prompt = "instruction" if "instruction" in row else "prompt"
        query = "input" if prompt == "instruction" else None
        answer = next((name for name in ANSWERS if name in row), None)
        columns = Columns({**names, "prompt": prompt, "query": query, "response": answer}, ranking=ranking)
        listed = answer is not None and not ranking and isinstance(row[answer], list)
        example = _listed(row, columns) if listed else find("formats", "alpaca").read(row, columns)
    if not example.answers:
        raise BadRow("no answer to score")
    return example


def _listed(row: Mapping[str, Any], columns: Columns) -> Example:
    """A prompt with a list of answers, of any number, with or without scores."""
    from luthier.core.types import Example
    from luthier.data.conversation import tools_text
    from luthier.data.instruction import instruction

    answers = tuple(_answers(row, columns))
    return Example(tuple(instruction(row, columns)), answers, columns.text(row, "system"), tools_text(row, columns))


def _answers(row: Mapping[str, Any], columns: Columns) -> list[Answer]:
    from luthier.core.types import NAN, Answer, Message
    from luthier.data.source import BadRow, excerpt

    texts, scores = columns.get(row, "response"), columns.get(row, "score")
    known = scores if isinstance(scores, list) else [NAN] * len(texts)
    if len(known) != len(texts):
        raise BadRow("not as many scores as answers", f"{len(texts)} answers, {len(known)} scores")
    for nth, (text, value) in enumerate(zip(texts, known), 1):
        if not isinstance(text, str) or not text:
            raise BadRow("an answer is not text" if text != "" else "empty answer", f"answer {nth}: {excerpt(text)}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadRow("a score is not a number", f"score {nth}: {excerpt(value)}")
    return [Answer((Message("assistant", text),), float(value)) for text, value in zip(texts, known)]


def _exam(row: int, example: Example, judge: Judge) -> Exam:
    try:
        encoded = judge.encode(example)
        prompt = judge.renderer.prompt(example.prompt, system=example.system, tools=example.tools)
    except LuthierError as error:
        raise DataError(f"--input, row {row + 1}: {error}") from error
    decode = judge.renderer.tokenizer.decode
    text = decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    texts = [answer.messages[-1].content for answer in example.answers]
    return Exam(row, encoded, text, texts, [answer.score for answer in example.answers])


def _asked(line: Mapping[str, Any]) -> tuple[str, list[str]]:
    return line["prompt"], [answer["text"] for answer in line["answers"]]


def _gaps(known: Sequence[float], found: Sequence[float]) -> list[float]:
    """How far each better answer is scored above each worse one; NaN compares with nothing."""
    return [a - b for a, x in zip(found, known) for b, y in zip(found, known) if x > y]
