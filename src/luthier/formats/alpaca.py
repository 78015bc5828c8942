"""Rows with an instruction, perhaps an input, and an output; `history` holds earlier exchanges (Stanford Alpaca).

A row may also bring `chosen` and `rejected` answers (`ranking: true`) or a true/false label (`kto_tag`). Without an
output column the row is a prompt alone, which is how LLaMA-Factory feeds plain text to pre-training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from luthier.core.types import Example, Message
from luthier.data.conversation import conversation
from luthier.data.source import BadRow, Columns, MissingColumn, excerpt


def read(row: Mapping[str, Any], columns: Columns) -> Example:
    """One row as an Example; raises BadRow."""
    if columns.name("prompt") is not None:
        columns.need(row, "prompt")
    elif columns.name("query") is None:
        raise MissingColumn("prompt", "instruction")
    text = "\n".join(part for part in (columns.text(row, "prompt"), columns.text(row, "query")) if part)
    if not text:
        raise BadRow("empty prompt")
    messages = [*_history(columns.get(row, "history")), Message("user", text)]
    response = None if columns.ranking else columns.get(row, "response")
    if response is not None:
        messages.append(_assistant(response, "response"))
    return conversation(row, columns, messages, _assistant)


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


def _assistant(text: Any, meaning: str) -> Message:
    if not isinstance(text, str):
        raise BadRow(f"{meaning} is not text", excerpt(text))
    return Message("assistant", text)
