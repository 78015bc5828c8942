"""Rows with an instruction, a list of outputs and a list of their scores: rankings of any length.

    {"instruction": "...", "input": "...", "output": ["best", "good", "bad"], "score": [3.0, 1.5, -1.0]}

Higher scores are better; outputs may stand in any order. `history`, `system` and `tools` work as they do in alpaca.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.core.types import Answer, Example, Message
from luthier.data.conversation import tools_text
from luthier.data.instruction import instruction
from luthier.data.media import with_images
from luthier.data.source import BadRow, Columns, excerpt


def read(row: Mapping[str, Any], columns: Columns) -> Example:
    """One row as an Example whose answers go from the best to the worst; raises BadRow."""
    texts = [_text(text, nth) for nth, text in enumerate(_list(row, columns, "response"), 1)]
    scores = [_number(score, nth) for nth, score in enumerate(_list(row, columns, "score"), 1)]
    _check(texts, scores)
    ranking = sorted(zip(texts, scores), key=lambda pair: -pair[1])
    answers = [
        Answer((Message("assistant", text),), score, f"candidate-{rank}") for rank, (text, score) in enumerate(ranking)
    ]
    return Example(
        tuple(with_images(row, columns, instruction(row, columns))),
        tuple(answers),
        columns.text(row, "system"),
        tools_text(row, columns),
    )


def _check(texts: Sequence[str], scores: Sequence[float]) -> None:
    if len(texts) != len(scores):
        raise BadRow("not as many scores as outputs", f"{len(texts)} outputs, {len(scores)} scores")
    if len(texts) < 2:
        raise BadRow("fewer than two outputs", f"{len(texts)}; a ranking compares at least two")
    if len(set(scores)) == 1:
        raise BadRow("all scores are equal", f"{scores[0]:g}: nothing to rank")
    known: dict[str, float] = {}
    for nth, (text, score) in enumerate(zip(texts, scores), 1):
        if known.setdefault(text, score) != score:
            raise BadRow("the same output with different scores", f"output {nth}: {known[text]:g} and {score:g}")


def _list(row: Mapping[str, Any], columns: Columns, meaning: str) -> list[Any]:
    value = columns.need(row, meaning)
    if not isinstance(value, list):
        raise BadRow(f"{columns.name(meaning)!r} is not a list", excerpt(value))
    return value


def _text(value: Any, nth: int) -> str:
    if not isinstance(value, str):
        raise BadRow("an output is not text", f"output {nth}: {excerpt(value)}")
    if not value:
        raise BadRow("empty output", f"output {nth}")
    return value


def _number(value: Any, nth: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow("a score is not a number", f"score {nth}: {excerpt(value)}")
    if not math.isfinite(value):
        raise BadRow("a score is not finite", f"score {nth}: {value}")
    return float(value)
