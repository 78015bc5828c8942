"""Plain text, one document a row: the lines of a .txt file, or a column called `text`, `prompt` or `content`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.core.types import Example, Message
from luthier.data.source import BadRow, Columns, MissingColumn, excerpt

USUAL = ("text", "prompt", "content")


def read(row: Mapping[str, Any], columns: Columns) -> Example:
    """One row as a prompt without answers; raises BadRow."""
    column = (
        columns.name("prompt") if "prompt" in columns.given else next((name for name in USUAL if name in row), None)
    )
    if column is None or column not in row:
        raise MissingColumn("prompt", column or "text")
    text = row[column]
    if not isinstance(text, str):
        raise BadRow(f"{column!r} is not text", excerpt(text))
    if not text:
        raise BadRow("empty text")
    return Example((Message("user", text),), ())
