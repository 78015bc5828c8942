"""Rows with an instruction, perhaps an input, and an output; `history` holds earlier exchanges (Stanford Alpaca).

A row may also bring `chosen` and `rejected` answers (`ranking: true`) or a true/false label (`kto_tag`). Without an
output column the row is a prompt alone, which is how LLaMA-Factory feeds plain text to pre-training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.core.types import Example, Message
from luthier.data.conversation import conversation
from luthier.data.instruction import instruction
from luthier.data.source import BadRow, Columns, excerpt


def read(row: Mapping[str, Any], columns: Columns) -> Example:
    """One row as an Example; raises BadRow."""
    messages = instruction(row, columns)
    response = None if columns.ranking else columns.get(row, "response")
    if response is not None:
        messages.append(_assistant(response, "response"))
    return conversation(row, columns, messages, _assistant)


def _assistant(text: Any, meaning: str) -> Message:
    if not isinstance(text, str):
        raise BadRow(f"{meaning} is not text", excerpt(text))
    return Message("assistant", text)
