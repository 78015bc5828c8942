"""What `luthier collect` leaves behind: rounds and contexts on disk, whole requests only, and what they add up to.

train.jsonl         one round a line; context.jsonl   one request a line, written after all its rounds
dataset_info.json   so that `dataset: rounds` with `dataset_dir` set to the folder trains on them
collect.json        what was asked for; a run that goes on must ask for the same
summary.json        requests, rounds, acceptance, scores
holdout/            the same two files for requests kept from training
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.core.errors import ConfigError, DataError
from luthier.core.log import get_logger
from luthier.resumable import append, take_off_half_line

log = get_logger("collect")

TRAIN, CONTEXT, HELD_OUT = "train.jsonl", "context.jsonl", "holdout"
SETTINGS, INFO, SUMMARY = "collect.json", "dataset_info.json", "summary.json"
BAR = 40
"""Width of the longest bar of the histogram."""


class Pair:
    """train.jsonl and context.jsonl of one folder. A request is there once its context is."""

    def __init__(self, folder: Path):
        self.folder, self._train, self._context = folder, folder / TRAIN, folder / CONTEXT
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._train.touch()
            self._context.touch()
        except OSError as error:
            raise ConfigError(f"--output: {folder} cannot be written: {error}.") from error
        self._rounds = 0

    def done(self) -> dict[str, list[int]]:
        """The prompt ids of each request that is there, by req_id; what a killed run left beyond them is taken off."""
        take_off_half_line(self._context)
        take_off_half_line(self._train)
        known = {line["req_id"]: line["prompt_ids"] for line in _lines(self._context, ("req_id", "prompt_ids"))}
        self._rounds, whole = 0, 0
        with self._train.open("rb") as file:
            for text in file:
                if _line(text, f"{self._train}, line {self._rounds + 1}", ("req_id",))["req_id"] not in known:
                    break
                self._rounds, whole = self._rounds + 1, whole + len(text)
        os.truncate(self._train, whole)
        return known

    def add(self, rounds: Sequence[Mapping[str, Any]], context: Mapping[str, Any]) -> None:
        """Write one request; it is on disk when this returns. `idx` counts the rounds of the file."""
        for path, lines in ((self._train, [{"idx": self._rounds + i, **line} for i, line in enumerate(rounds)]),
                            (self._context, [context])):  # fmt: skip
            with path.open("a", encoding="utf-8") as file:
                append(file, lines)
        self._rounds += len(rounds)

    def requests(self) -> Iterator[dict[str, Any]]:
        """The lines of context.jsonl."""
        return _lines(self._context, ("req_id",))

    def rounds(self) -> Iterator[dict[str, Any]]:
        """The lines of train.jsonl."""
        return _lines(self._train, ("req_id",))


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder that of a run with these settings. Raises ConfigError where it is another's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output: {folder} cannot be written: {error}.") from error
    file, settings = folder / SETTINGS, json.loads(json.dumps(settings))
    if file.exists():
        before = _line(file.read_bytes(), str(file), ())
        other = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
        if other:
            words = "; ".join(f"{key} was {before.get(key)!r} and is {settings.get(key)!r}" for key in sorted(other))
            raise ConfigError(f"--output: {folder} was begun with other settings ({words}). Give another --output.")
    elif (folder / TRAIN).exists():
        raise ConfigError(f"--output: {folder} holds a {TRAIN} of somebody else. Give another --output.")
    else:
        _write(file, settings)


def describe(folder: Path, *, held_out: bool) -> None:
    """Write dataset_info.json."""
    info = {"rounds": {"file_name": TRAIN, "formatting": "accept_head"}}
    if held_out:
        info["rounds_holdout"] = {"file_name": f"{HELD_OUT}/{TRAIN}", "formatting": "accept_head"}
    _write(folder / INFO, info)


def summarise(folder: Path, pairs: Iterable[Pair]) -> dict[str, Any]:
    """Count what is in the files, write summary.json and log it."""
    pairs = list(pairs)
    requests = [line for pair in pairs for line in pair.requests()]
    count = {"rounds": 0, "drafted": 0, "accepted": 0}
    tokens = 0
    scores: list[float] = []
    for pair in pairs:
        ends = {line["req_id"]: len(line["prompt_ids"]) + len(line["answer_ids"]) for line in pair.requests()}
        for line in pair.rounds():
            draft, verifier = line["spd_round_draft_ids"], line["spd_round_verifier_ids"]
            agreed = next((i for i, (d, v) in enumerate(zip(draft, verifier)) if d != v), len(draft))
            scores += map(float, line["mismatch_score"])
            count["rounds"] += 1
            count["drafted"] += len(draft)
            count["accepted"] += agreed
            # The pass that reaches the end of an answer brings no token beyond it.
            tokens += min(agreed + 1, ends[line["req_id"]] - line["context_ids_len"])
    empty = sum(line["empty_drafts"] for line in requests)
    passes = count["rounds"] + empty
    summary = {
        "requests": len(requests),
        "held_out": sum(1 for _ in pairs[-1].requests()) if len(pairs) > 1 else 0,
        "unfinished_answers": sum(not line["finished"] for line in requests),
        **count,
        "unscored": sum(line["unscored"] for line in requests),
        "empty_drafts": empty,
        "acceptance_rate": _share(count["accepted"], count["drafted"]),
        "tokens_per_target_pass": _share(tokens + empty, passes),
        "mismatches": len(scores),
        "mean_score": _share(sum(scores), len(scores)),
        "histogram": [sum(_bin(score) == i for score in scores) for i in range(11)],
    }
    _write(folder / SUMMARY, summary)
    for line in _told(summary):
        log.info("%s", line)
    return summary


def _told(summary: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "{requests} requests ({held_out} held out), {rounds} rounds, {drafted} tokens drafted; {empty_drafts} drafts "
        "were empty.".format(**summary)
    )
    if summary["rounds"]:
        yield (
            "Accepted as they are: {:.1f} % of the drafted tokens, which gives {:.2f} tokens per target pass.".format(
                100 * summary["acceptance_rate"], summary["tokens_per_target_pass"]
            )
        )
    if summary["unfinished_answers"]:
        yield "{unfinished_answers} answers did not end within max_new_tokens.".format(**summary)
    if summary["unscored"]:
        yield "{unscored} mismatches got no score and were left out.".format(**summary)
    if summary["mismatches"]:
        yield "{mismatches} mismatches are scored, {mean_score:.2f} of 10 on average:".format(**summary)
        most = max(summary["histogram"])
        for score, number in enumerate(summary["histogram"]):
            yield f"  {score:>2} {'#' * -(-BAR * number // most):<{BAR}} {number}"


def _bin(score: float) -> int:
    """Whole scores stand by themselves; what lies between goes to the nearest."""
    return int(score + 0.5)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _lines(path: Path, holds: Sequence[str]) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            yield _line(text, f"{path}, line {number}", holds)


def _line(text: bytes, place: str, holds: Sequence[str]) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise DataError(f"{place} is not JSON ({error}); somebody else wrote it. Give another --output.") from None
    if not isinstance(line, dict) or not all(key in line for key in holds):
        raise DataError(f"{place} lacks {' or '.join(holds)}; somebody else wrote it. Give another --output.")
    return line


def _write(path: Path, value: Mapping[str, Any]) -> None:
    staged = path.with_name(f".partial-{path.name}")
    with staged.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)
