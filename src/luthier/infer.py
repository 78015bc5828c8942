"""Answers to a file of prompts.

luthier infer CONFIG --input prompts.jsonl --output answers.jsonl [--n 8 --select best|vote|rm] [key=value ...]

Each answer is a line {"row", "prompt", "predict"} and "label" where the row brings the expected answer. With --n the
line also keeps the n candidates with what they were chosen by. A run that was interrupted goes on where it stopped
when the same command is given again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.commands import parse_command
from luthier.core.errors import ConfigError, DataError, LuthierError
from luthier.core.log import get_logger
from luthier.resumable import append, make, progress, read_examples, resume

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.core.types import Encoded, Example
    from luthier.engines.best_of import Candidate
    from luthier.engines.sampling import GenerateConfig
    from luthier.engines.scoring import Judge
    from luthier.run import Run
    from luthier.serving import Speaker

log = get_logger("infer")

WINDOW = 4
"""Batches that are sorted by length together; their answers are written together, in order."""
EXPECTED = "messages (role, content), or prompt, or instruction and input"


@dataclass(frozen=True)
class Question:
    """A row of the input, ready for the model."""

    row: int
    """Place in the input, counted from 0."""
    ids: list[int]
    prompt: str
    """What the model is given, as text."""
    label: str | None
    example: Example

    @property
    def images(self) -> list[str]:
        """What the prompt shows, in order."""
        return [named for message in self.example.prompt for named in message.media]

    def answered(self, predict: str, more: Mapping[str, Any]) -> dict[str, Any]:
        """The line of the output."""
        line = {"row": self.row, "prompt": self.prompt, "predict": predict, **more}
        return line if self.label is None else line | {"label": self.label}


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code."""
    from luthier.run import resolve
    from luthier.serving import load_engine

    command = parse_command(argv, "infer")
    source, output = (Path(command.flags[flag]).expanduser() for flag in ("input", "output"))
    run = resolve(command.config, command.overrides, verb="infer")
    select = _selection(command.flags["n"], command.flags["select"], run)
    run.announce(log)
    examples = read_examples(source, read_shown, expected=EXPECTED)
    make(output)
    speaker = load_engine(run)
    questions = [question_of(row, example, speaker) for row, example in enumerate(examples)]
    if select is not None and any(question.images for question in questions):
        raise ConfigError(f"--n {command.flags['n']}: prompts with images are answered once each. Leave --n out.")
    choice = () if select is None else (command.flags["n"], select)
    asked = {question.row: (question.prompt, *choice) for question in questions}
    names = ("prompt", "n", "select")[: 1 + len(choice)]
    done = resume(output, asked, lambda line: tuple(line[name] for name in names), holds=("row", "predict", *names))
    left = [question for question in questions if question.row not in done]
    chooser = None if select is None else Chooser(speaker, run, command.flags["n"], select)
    infer(speaker, run.generate, left, output, chooser)
    log.info("%d answers are in %s.", len(questions), output)
    return 0


def read_row(row: Mapping[str, Any]) -> Example:
    """A row as an example, by its columns; raises BadRow, also for one that shows images."""
    from luthier.data.source import BadRow

    example = read_shown(row)
    if any(message.media for message in example.prompt):
        raise BadRow("images are answered by `luthier infer` only")
    return example


def read_shown(row: Mapping[str, Any]) -> Example:
    """A row as an example, by its columns, with the images it shows; raises BadRow."""
    from luthier.core.registry import find

    name, columns = _shape(row)
    return find("formats", name).read(row, columns)


def infer(
    speaker: Speaker, sampling: GenerateConfig, questions: Sequence[Question], output: Path, chooser: Chooser | None
) -> None:
    """Answer questions and append each answer to `output`; what is written is on disk before the next batch."""
    size = sampling.infer_batch_size * WINDOW
    with output.open("a", encoding="utf-8") as file, progress(len(questions), "answering") as advance:
        for start in range(0, len(questions), size):
            window = questions[start : start + size]
            if chooser is not None:
                append(file, chooser.lines(window, sampling))
            else:
                answers = speaker.engine.generate(
                    [question.ids for question in window],
                    sampling,
                    speaker.renderer.stop_ids,
                    seeds=[_seed(speaker.seed, question.row) for question in window],
                    media=shown(window, speaker),
                )
                texts = [speaker.engine.text(ids, sampling) for ids in answers]
                append(file, (question.answered(text, {}) for question, text in zip(window, texts)))
            advance(len(window))


def shown(questions: Sequence[Question], speaker: Speaker) -> dict[int, Callable[[], Mapping[str, Tensor]]]:
    """For each question that shows images, by its place: what makes the tensors that the model is given of them."""
    from luthier.data.processor_template import Seeing

    renderer, made = speaker.renderer, {}
    for place, question in enumerate(questions):
        if question.images:
            assert isinstance(renderer, Seeing)
            made[place] = partial(renderer.vision.row, question.images, question.ids)
    return made


class Chooser:
    """Draws n answers to each question and chooses one; see `engines.best_of`."""

    def __init__(self, speaker: Speaker, run: Run, n: int, select: str):
        from luthier.serving import find_run, load_judge, trees_of

        self._speaker, self._n, self._select = speaker, n, select
        self._trees = trees_of(speaker)
        self._judge: Judge | None = None
        if select == "rm":
            assert run.score.reward_model is not None
            self._judge = load_judge(find_run(run.score.reward_model, verb="score"), run.score)

    def lines(self, questions: Sequence[Question], sampling: GenerateConfig) -> list[dict[str, Any]]:
        """One line per question, with all candidates in the order they were drawn."""
        from luthier.engines.best_of import SELECT

        lines = []
        for question, candidates in zip(questions, self._draw(questions, sampling)):
            chosen, said = SELECT[self._select](candidates)
            shown = [{"text": one.text, "logp": one.logp, **more} for one, more in zip(candidates, said)]
            more = {"n": self._n, "select": self._select, "candidates": shown}
            lines.append(question.answered(candidates[chosen].text, more))
        return lines

    def _draw(self, questions: Sequence[Question], sampling: GenerateConfig) -> list[list[Candidate]]:
        from luthier.engines.best_of import Candidate, mean_logps

        speaker, n = self._speaker, self._n
        flat = speaker.engine.generate(
            [question.ids for question in questions for _ in range(n)],
            sampling,
            speaker.renderer.stop_ids,
            seeds=[_seed(speaker.seed, question.row, nth) for question in questions for nth in range(n)],
            keep_stop=True,
        )
        answers = [flat[start : start + n] for start in range(0, len(flat), n)]
        together = max(1, sampling.infer_batch_size // n)
        logps = mean_logps(self._trees, [question.ids for question in questions], answers, together)
        texts = [[self._text(ids, sampling) for ids in several] for several in answers]
        if self._judge is None:
            return [[Candidate(*one) for one in zip(*both)] for both in zip(texts, logps)]
        return self._judged(questions, texts, logps)

    def _judged(
        self, questions: Sequence[Question], texts: Sequence[Sequence[str]], logps: Sequence[Sequence[float]]
    ) -> list[list[Candidate]]:
        from luthier.engines.best_of import Candidate
        from luthier.engines.scoring import worth

        assert self._judge is not None
        items = [_to_judge(question, several, self._judge) for question, several in zip(questions, texts)]
        said = self._judge.judge(items)
        return [
            [Candidate(text, logp, what, worth(what)) for text, logp, what in zip(*row)]
            for row in zip(texts, logps, said)
        ]

    def _text(self, ids: list[int], sampling: GenerateConfig) -> str:
        ended = bool(ids) and ids[-1] in self._speaker.renderer.stop_ids
        return self._speaker.engine.text(ids[: len(ids) - ended], sampling)


def _selection(n: int, select: str | None, run: Run) -> str | None:
    """How one of n answers is chosen; None where there is only one. Raises ConfigError."""
    if n < 1:
        raise ConfigError(f"--n {n}: must be 1 or more.")
    if n == 1:
        if select is not None:
            raise ConfigError(f"--select {select} chooses among several answers: add --n 8, for example.")
        return None
    if not run.generate.do_sample or run.generate.num_beams > 1:
        raise ConfigError(f"--n {n} draws {n} answers at random; it needs do_sample: true and num_beams: 1.")
    if select == "rm" and run.score.reward_model is None:
        raise ConfigError(
            "--select rm needs reward_model: a folder that `luthier train` left behind (stage rm), or its YAML file."
        )
    return select or "best"


def _to_judge(question: Question, texts: Sequence[str], judge: Judge) -> Encoded:
    from luthier.core.types import Answer, Example, Message

    asked = question.example
    answers = tuple(Answer((Message("assistant", text),)) for text in texts)
    try:
        return judge.encode(Example(asked.prompt, answers, asked.system, asked.tools))
    except LuthierError as error:
        raise DataError(f"--input, row {question.row + 1}: reward_model: {error}") from error


def _shape(row: Any) -> tuple[str, Any]:
    """The format of a row by its columns, and how that format is to read them."""
    from luthier.data.source import COLUMNS, Columns

    media = {"images": "images", "videos": "videos", "audios": "audios"}
    if "messages" in row:
        return "openai", Columns({**COLUMNS, **media, "messages": "messages", "system": "system", "tools": "tools"})
    if "conversations" in row:
        return "sharegpt", Columns({**COLUMNS, **media, "system": "system", "tools": "tools"})
    names = {**COLUMNS, **media, "system": "system", "history": "history", "tools": "tools"}
    if "instruction" in row:
        return "alpaca", Columns(names)
    answer = next((name for name in ("response", "output", "label") if name in row), None)
    return "alpaca", Columns(
        {**names, "prompt": "text" if "text" in row else "prompt", "query": None, "response": answer}
    )


def question_of(row: int, example: Example, speaker: Speaker) -> Question:
    """A row as the model is given it. Raises DataError."""
    from luthier.data.processor_template import Seeing
    from luthier.data.source import BadRow

    if any(message.media for message in example.prompt) and not isinstance(speaker.renderer, Seeing):
        raise DataError(
            f"--input, row {row + 1}: shows images, and this run cannot show them to the model, which reads text alone."
        )
    try:
        ids = speaker.renderer.prompt(example.prompt, system=example.system, tools=example.tools)
    except BadRow as bad:
        raise DataError(f"--input, row {row + 1}: {bad.reason}: {bad.detail}") from None
    except LuthierError as error:
        raise DataError(f"--input, row {row + 1}: {error}") from error
    label = example.answers[0].messages[-1].content if example.answers else None
    prompt = speaker.engine.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Question(row, ids, prompt, label, example)


def _seed(seed: int, row: int, nth: int = 0) -> int:
    # Generators look at 32 bits; neighbouring runs must not share seeds with neighbouring rows, nor rows with the
    # further answers of others: those stand 2^32 / golden ratio apart.
    return (seed * 1_000_003 + row + nth * 2_654_435_769) % 2**32
