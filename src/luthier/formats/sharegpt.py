"""Rows with a conversation: a list of messages, each with a role and a text (ShareGPT).

The names of the columns, of the two keys in a message and of the roles are the data set's `columns` and `tags`. Turns
may stand in any order that the template can write. A message may carry a loss `weight` or `loss`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.core.types import Example, Message
from luthier.data.conversation import conversation, loss_weight
from luthier.data.media import content
from luthier.data.source import BadRow, Columns, excerpt

ROLES = ("user", "assistant", "observation", "function", "system")


def read(row: Mapping[str, Any], columns: Columns) -> Example:
    """One row as an Example; raises BadRow."""
    turns = columns.need(row, "messages")
    if not isinstance(turns, list):
        raise BadRow(f"{columns.name('messages')!r} is not a list", excerpt(turns))
    messages = [_message(turn, columns, f"message {nth}") for nth, turn in enumerate(turns, 1)]
    return conversation(row, columns, messages, lambda value, meaning: _choice(value, columns, meaning))


def _message(turn: Any, columns: Columns, where: str) -> Message:
    role_key, content_key = columns.tags["role_tag"], columns.tags["content_tag"]
    if not isinstance(turn, Mapping) or role_key not in turn or content_key not in turn:
        openai = isinstance(turn, Mapping) and "role" in turn and "content" in turn
        cure = "; with role and content it is formatting: openai" if openai else ""
        raise BadRow(f"a message without {role_key!r} and {content_key!r}{cure}", f"{where}: {excerpt(turn)}")
    roles = {columns.tags[f"{role}_tag"]: role for role in ROLES}
    role = turn[role_key]
    if not isinstance(role, str) or role not in roles:
        raise BadRow("unknown role", f"{where}: {excerpt(role)} is none of {', '.join(roles)}")
    text, media = content(turn[content_key], where)
    if turn[content_key] is None:
        raise BadRow("a message that is not text", f"{where}: {excerpt(None)}")
    return Message(roles[role], text, loss_weight(turn, where), media)


def _choice(value: Any, columns: Columns, meaning: str) -> Message:
    return Message("assistant", value) if isinstance(value, str) else _message(value, columns, meaning)
