"""Rows with an instruction, perhaps an input, and an output; `history` holds earlier exchanges (Stanford Alpaca).

A row may also bring `chosen` and `rejected` answers (`ranking: true`) or a true/false label (`kto_tag`). Without an
output column the row is a prompt alone, which is how LLaMA-Factory feeds plain text to pre-training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from luthier.core.types import Answer, Example, Message
from luthier.data.source import BadRow, Columns, MissingColumn, excerpt


def read(row: Mapping[str, Any], columns: Columns) -> Example:
    """One row as an Example; raises BadRow."""
    if columns.name("prompt") is None and columns.name("query") is None:
        raise MissingColumn("prompt", "instruction")
    if columns.name("prompt") is not None:
        columns.need(row, "prompt")
    said = [columns.text(row, "prompt"), columns.text(row, "query")]
    text = "\n".join(part for part in said if part)
    if not text:
        raise BadRow("empty prompt")
    tools = columns.get(row, "tools") or ""
    return Example(
        prompt=(*_history(columns.get(row, "history")), Message("user", text)),
        answers=_answers(row, columns),
        system=columns.text(row, "system"),
        tools=tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False),
    )


def _history(value: Any) -> Iterator[Message]:
    if value is None:
        return
    if not isinstance(value, list):
        raise BadRow("history is not a list of [prompt, response] pairs", excerpt(value))
    for pair in value:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRow("history is not a list of [prompt, response] pairs", excerpt(pair))
        yield Message("user", pair[0])
        yield Message("assistant", pair[1])


def _answers(row: Mapping[str, Any], columns: Columns) -> tuple[Answer, ...]:
    if columns.ranking:
        return (
            _answer(columns.need(row, "chosen"), "chosen", 1.0, "chosen"),
            _answer(columns.need(row, "rejected"), "rejected", 0.0, "rejected"),
        )
    response = columns.get(row, "response")
    if response is None:
        return ()
    if columns.name("kto_tag") is None:
        return (_answer(response, "response"),)
    liked = columns.need(row, "kto_tag")
    if not isinstance(liked, bool):
        raise BadRow(f"{columns.name('kto_tag')!r} is not true or false", excerpt(liked))
    return (_answer(response, "response", 1.0 if liked else -1.0),)


def _answer(text: Any, meaning: str, score: float = float("nan"), name: str = "response") -> Answer:
    if not isinstance(text, str):
        raise BadRow(f"{meaning} is not text", excerpt(text))
    if not text:
        raise BadRow(f"empty {meaning}")
    return Answer((Message("assistant", text),), score, name)
