"""Training data for the accept head: prompts in, speculative rounds out.

luthier collect CONFIG --input prompts.jsonl --output FOLDER [--holdout SHARE] [key=value ...]

The target answers each prompt. Its answer is walked as speculative decoding would walk it: at each cut the drafter
(`draft`) proposes tokens, one pass of the target says what it would have said in their place, and a scorer
(`collect_scorer`) says how good it would be to keep the draft's token. FOLDER then holds train.jsonl, context.jsonl and
a dataset_info.json. A run that was interrupted goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from luthier.commands import parse_command
from luthier.core.errors import ConfigError, DataError, LuthierError, refuse_all
from luthier.core.log import get_logger
from luthier.core.prefix import common_prefix
from luthier.core.registry import names

if TYPE_CHECKING:
    from luthier.collection import Pair
    from luthier.core.types import Example
    from luthier.run import Run
    from luthier.scorers._spot import Spot

log = get_logger("collect")

GOLDEN = (math.sqrt(5) - 1) / 2
IDLE = (
    *("infer_batch_size", "collect_llm_key_env", "collect_llm_workers", "collect_llm_timeout", "collect_llm_retries"),
    *("accept_head", "accept_threshold", "skip_special_tokens", "num_beams", "length_penalty", "repetition_penalty"),
)
"""Keys of the sections that collect looks at which do not decide what is collected."""
OPENING, BETWEEN = "USER: ", "\nASSISTANT:"
"""Around the texts of a context, of which `context_len` counts characters."""
SPEAKS = {"user": "USER: ", "observation": "USER: ", "assistant": "ASSISTANT:", "function": "ASSISTANT:"}


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Keys of `collect`, which also takes those of generate and speculate."""

    collect_scorer: str = "rerun"
    """Who scores a mismatch, a file of scorers/: rerun (does the final answer stay right), kl or prob (how far draft
    and target are apart), llm (a language model is asked)."""
    collect_mismatches: Literal["first", "all"] = "first"
    """Score the first mismatch of a round, or all of them; what the target says after the first follows the draft's
    text and not its own."""
    collect_stride: int = 0
    """Tokens from the beginning of one round to the next; 0 begins each where decoding would: after the accepted
    tokens and the correction."""

    def __post_init__(self) -> None:
        if self.collect_stride < 0:
            raise ConfigError(f"collect_stride: {self.collect_stride} must be 0 or more.")


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code."""
    from luthier.collection import HELD_OUT, Pair, claim, describe, summarise
    from luthier.infer import EXPECTED, read_row
    from luthier.resumable import read_examples
    from luthier.run import resolve

    command = parse_command(argv, "collect")
    source, folder = (Path(command.flags[flag]).expanduser() for flag in ("input", "output"))
    run, share = resolve(command.config, command.overrides, verb="collect"), command.flags["holdout"]
    _refuse(run, share)
    run.announce(log)
    examples = read_examples(source, read_row, expected=EXPECTED)
    claim(folder, _settings(run, share))
    describe(folder, held_out=share > 0)
    pairs = [Pair(folder), *([Pair(folder / HELD_OUT)] if share else [])]
    collector = Collector(run, folder)
    questions = [collector.question(row, example) for row, example in enumerate(examples)]
    collector.collect(questions, [pairs[held] for held in held_out(questions, share)])
    summarise(folder, pairs)
    log.info("To train on the rounds in %s: dataset_dir: %s, dataset: rounds.", folder, folder)
    return 0


@dataclass(frozen=True)
class Question:
    """A row of the input, ready for the target."""

    row: int
    """Place in the input, counted from 0; as text its `req_id`."""
    text: str
    """The whole conversation up to the answer, as `user_text`."""
    ids: list[int]
    label: str | None
    """The answer that the row brings, if it does."""


class Collector:
    """The target, its drafter and its scorer, ready to work. What the scorer learns it keeps in `folder`."""

    def __init__(self, run: Run, folder: Path):
        from luthier.core.registry import find
        from luthier.engines.drafting import make_drafter
        from luthier.engines.rounds import Rules
        from luthier.engines.target import Target
        from luthier.scorers._spot import Tools, scorer_in
        from luthier.serving import load_engine

        speaker = load_engine(run)
        self._engine, self._renderer, self._seed = speaker.engine, speaker.renderer, speaker.seed
        self._sampling = run.generate
        stop_ids = tuple(speaker.renderer.stop_ids)
        self._target = Target(self._engine.model.eval())
        self._drafter = make_drafter(run.speculate, self._target, self._engine.tokenizer, run.model)
        self._rules = Rules(
            draft_tokens=run.speculate.draft_tokens,
            stop_ids=stop_ids,
            context=self._engine.context,
            stride=run.collect.collect_stride,
            every=run.collect.collect_mismatches == "all",
        )
        self._tools = Tools(self._engine, run.generate, stop_ids, self._seed, folder)
        self._scorer = scorer_in(find("scorers", run.collect.collect_scorer))(run.scorer_keys, self._tools)

    def question(self, row: int, example: Example) -> Question:
        """A row as ids and as text. Raises DataError."""
        try:
            ids = self._renderer.prompt(example.prompt, system=example.system, tools=example.tools)
        except LuthierError as error:
            raise DataError(f"--input, row {row + 1}: {error}") from error
        if self._sampling.room(len(ids), self._engine.context) < 1:
            raise DataError(
                f"--input, row {row + 1}: its {len(ids)} tokens leave no room for an answer: the model takes "
                f"{self._engine.context}. Shorten the prompt or remove the row; nothing was answered."
            )
        label = example.answers[0].messages[-1].content if example.answers else None
        return Question(row, user_text(example), ids, label)

    def collect(self, questions: Sequence[Question], homes: Sequence[Pair]) -> None:
        """Write the rounds of each question into its home, request after request, but for those that are there."""
        from luthier.resumable import progress

        left = _left(questions, homes)
        size = self._sampling.infer_batch_size
        with progress(len(left), "collecting") as advance:
            for start in range(0, len(questions), size):
                window = questions[start : start + size]
                if not left.intersection(question.row for question in window):
                    continue
                # All of the window, also what is there: an answer's last digits depend on what shares its batch.
                for question, answer in zip(window, self._answers(window)):
                    if question.row in left:
                        homes[question.row].add(*self.request(question, answer))
                        advance(1)

    def request(self, question: Question, answer: list[int]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The lines of train.jsonl, without idx, and the line of context.jsonl."""
        from luthier.engines.rounds import walk
        from luthier.scorers._spot import Request, Spot

        found = walk(self._target, self._drafter, question.ids, answer, self._rules)
        request = Request(question.row, question.text, question.ids, answer, question.label)
        spots = [Spot(request, one, mismatch) for one in found.rounds for mismatch in one.mismatches]
        scored = [(spot, score) for spot, score in zip(spots, self._scorer.score(spots)) if not math.isnan(score)]
        text = self._tools.text(answer)
        opening = len(f"{OPENING}{question.text}{BETWEEN}")
        # Tokens may end in the middle of a character, which then does not count.
        rounds = [
            {
                "req_id": str(question.row),
                "context_len": opening + common_prefix(self._tools.text(answer[: one.cut]), text),
                "context_ids_len": len(question.ids) + one.cut,
                "spd_round_draft_ids": one.draft,
                "spd_round_verifier_ids": one.verifier,
                **_columns([(spot, score) for spot, score in scored if spot.round is one]),
            }
            for one in found.rounds
        ]
        return rounds, {
            "req_id": str(question.row),
            "user_text": question.text,
            "assistant_text": text,
            "prompt_ids": question.ids,
            "answer_ids": answer,
            "finished": answer[-1] in self._rules.stop_ids,
            "empty_drafts": found.empty,
            "unscored": len(spots) - len(scored),
        }

    def _answers(self, questions: Sequence[Question]) -> list[list[int]]:
        return self._engine.generate(
            [question.ids for question in questions],
            self._sampling,
            self._rules.stop_ids,
            seeds=[(self._seed * 1_000_003 + question.row) % 2**32 for question in questions],
            keep_stop=True,
        )


def user_text(example: Example) -> str:
    """Everything before the answer, in the words of the text contexts: system prompt, tools, earlier turns."""
    turns = "\n".join(f"{SPEAKS[turn.role]}{turn.content}" for turn in example.prompt).removeprefix(OPENING)
    return "\n\n".join(part for part in (example.system, example.tools, turns) if part)


def held_out(questions: Sequence[Question], share: float) -> list[bool]:
    """Which questions are kept from training: about `share` of them, well spread.

    A question stays where it is when more follow it, and one that was asked before goes where it went then.
    """
    before: dict[tuple[int, ...], bool] = {}
    for question in questions:
        # Multiples of the golden ratio fill the unit interval evenly, however many there are (Steinhaus 1957).
        before.setdefault(tuple(question.ids), (question.row + 1) * GOLDEN % 1 < share)
    return [before[tuple(question.ids)] for question in questions]


def _refuse(run: Run, share: float) -> None:
    """Raise ConfigError for what does not go together."""
    drafters = ", ".join(names("drafters"))
    rules = (
        (0 <= share < 1, f"--holdout {share}: must be at least 0 and below 1"),
        (run.speculate.draft is not None, f"draft is not set; say who drafts: {drafters}"),
        (run.generate.num_beams == 1, f"num_beams: {run.generate.num_beams} must be 1: rounds follow one answer"),
        (run.generate.repetition_penalty == 1, f"repetition_penalty: {run.generate.repetition_penalty} must be 1: a"
         " draft is held against what the model itself finds most probable"),
    )  # fmt: skip
    refuse_all(f"{what}." for holds, what in rules if not holds)


def _settings(run: Run, share: float) -> dict[str, Any]:
    """What decides the content of the folder; a run that goes on must not change it."""
    sections = (run.template, run.generate, run.speculate, run.collect, run.scorer_keys)
    keys = {key: value for section in sections for key, value in asdict(section).items() if key not in IDLE}
    model = {"model_name_or_path": run.model.model_name_or_path, "model_revision": run.model.model_revision}
    adapter = {"adapter_name_or_path": run.adapter.adapter_name_or_path}
    return {**model, **adapter, **keys, "seed": run.training.get("seed"), "holdout": share}


def _left(questions: Sequence[Question], homes: Sequence[Pair]) -> set[int]:
    """Rows that are not written yet. Raises DataError if what is written answers something else."""
    done = {id(home): home.done() for home in dict.fromkeys(homes)}
    left = {question.row for question in questions if str(question.row) not in done[id(homes[question.row])]}
    for question, home in zip(questions, homes):
        written = done[id(home)].pop(str(question.row), question.ids)
        if written != question.ids:
            raise DataError(
                f"{home.folder}: request {question.row} there was another prompt than row {question.row + 1} of --input"
                " is now. Give another --output."
            )
    for home in dict.fromkeys(homes):
        for number in done[id(home)]:
            raise DataError(f"{home.folder}: request {number} is no row of --input now. Give another --output.")
    if len(left) < len(questions):
        log.info("%d of %d requests are there already.", len(questions) - len(left), len(questions))
    return left


def _columns(scored: Sequence[tuple[Spot, float]]) -> dict[str, list[Any]]:
    """Scores of 0 to 10, and measures with six digits: more says nothing, and lines stay short."""
    mismatches = [spot.mismatch for spot, _ in scored]
    return {
        "mismatch_index": [mismatch.index for mismatch in mismatches],
        "mismatch_score": [round(10 * score, 4) for _, score in scored],
        "mismatch_kl": [float(f"{mismatch.kl:.6g}") for mismatch in mismatches],
        "mismatch_prob": [float(f"{mismatch.prob:.6g}") for mismatch in mismatches],
        "mismatch_rank": [mismatch.rank for mismatch in mismatches],
    }
