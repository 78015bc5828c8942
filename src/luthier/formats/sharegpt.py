"""Rows with a conversation: a list of messages, each with a role and a text (ShareGPT).

The names of the columns, of the two keys in a message and of the roles are the data set's `columns` and `tags`. User
and observation turns alternate with assistant and function turns; a leading system message outranks the system column.
A message may carry a loss `weight`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from luthier.core.types import Answer, Example, Message
from luthier.data.source import BadRow, Columns, excerpt

TURNS = (("user", "observation"), ("assistant", "function"))


def read(row: Mapping[str, Any], columns: Columns) -> Example:
    """One row as an Example; raises BadRow."""
    turns = columns.need(row, "messages")
    if not isinstance(turns, list) or not turns:
        raise BadRow(
            "empty conversation" if not turns else f"{columns.name('messages')!r} is not a list", excerpt(turns)
        )
    messages = [_message(turn, columns, f"message {nth}") for nth, turn in enumerate(turns, 1)]
    system = columns.text(row, "system")
    if messages[0].role == "system":
        system = messages.pop(0).content
    _check_order(messages)
    tools = columns.get(row, "tools") or ""
    prompt, answers = _split(row, columns, tuple(messages))
    return Example(prompt, answers, system, tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False))


def _message(turn: Any, columns: Columns, where: str) -> Message:
    role_key, content_key = columns.tags["role_tag"], columns.tags["content_tag"]
    if not isinstance(turn, Mapping) or role_key not in turn or content_key not in turn:
        raise BadRow(f"a message without {role_key!r} and {content_key!r}", f"{where}: {excerpt(turn)}")
    roles = {columns.tags[f"{role}_tag"]: role for role in ("user", "assistant", "observation", "function", "system")}
    role = roles.get(turn[role_key]) if isinstance(turn[role_key], str) else None
    if role is None:
        raise BadRow("unknown role", f"{where}: {excerpt(turn[role_key])} is none of {', '.join(roles)}")
    content, weight = turn[content_key], turn.get("weight")
    if not isinstance(content, str):
        raise BadRow("a message that is not text", f"{where}: {excerpt(content)}")
    if weight is not None and (not isinstance(weight, int | float) or weight < 0):
        raise BadRow("a message weight that is not a number of 0 or more", f"{where}: {excerpt(weight)}")
    return Message(role, content, None if weight is None else float(weight))


def _check_order(messages: list[Message]) -> None:
    for nth, message in enumerate(messages):
        if message.role not in TURNS[nth % 2]:
            wanted = " or ".join(TURNS[nth % 2])
            raise BadRow("wrong order of roles", f"turn {nth + 1} is {message.role}, expected {wanted}")
    if not messages:
        raise BadRow("empty conversation", "only a system message")


def _split(
    row: Mapping[str, Any], columns: Columns, messages: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Answer, ...]]:
    """What is asked and what is answered. A conversation that ends with a user's turn has no answer of its own."""
    if columns.ranking:
        if len(messages) % 2 == 0:
            raise BadRow(
                "wrong order of roles", "the conversation before chosen and rejected must end with a user turn"
            )
        return messages, (_choice(row, columns, "chosen", 1.0), _choice(row, columns, "rejected", 0.0))
    if len(messages) % 2:
        return messages, ()
    *prompt, last = messages
    if not last.content:
        raise BadRow("empty response")
    if columns.name("kto_tag") is None:
        return tuple(prompt), (Answer((last,)),)
    liked = columns.need(row, "kto_tag")
    if not isinstance(liked, bool):
        raise BadRow(f"{columns.name('kto_tag')!r} is not true or false", excerpt(liked))
    return tuple(prompt), (Answer((last,), 1.0 if liked else -1.0),)


def _choice(row: Mapping[str, Any], columns: Columns, meaning: str, score: float) -> Answer:
    value = columns.need(row, meaning)
    message = Message("assistant", value) if isinstance(value, str) else _message(value, columns, meaning)
    if message.role not in TURNS[1]:
        raise BadRow("wrong order of roles", f"{meaning} is a {message.role} message, expected assistant or function")
    if not message.content:
        raise BadRow(f"empty {meaning}")
    return Answer((message,), score, meaning)
