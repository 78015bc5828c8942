"""What rows with an instruction begin with: earlier exchanges, the instruction, perhaps an input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from luthier.core.types import Message
from luthier.data.source import BadRow, Columns, MissingColumn, excerpt


def instruction(row: Mapping[str, Any], columns: Columns) -> list[Message]:
    """The messages a row asks with, the last of them the user's; raises BadRow."""
    if columns.name("prompt") is not None:
        columns.need(row, "prompt")
    elif columns.name("query") is None:
        raise MissingColumn("prompt", "instruction")
    text = "\n".join(part for part in (columns.text(row, "prompt"), columns.text(row, "query")) if part)
    if not text:
        raise BadRow("empty prompt")
    return [*_history(columns.get(row, "history")), Message("user", text)]


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
