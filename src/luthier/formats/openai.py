"""Rows with `messages` as OpenAI's API takes them: role and content, `tool_calls`, tool results.

A content may be a list of parts, text and images. An assistant's tool calls become a function turn, with the text
before the calls kept. A message may carry a loss `weight` or `loss`. The names of keys and roles can be changed with
`tags`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from luthier.core.types import Example, Message
from luthier.data.conversation import conversation, loss_weight
from luthier.data.media import content
from luthier.data.source import TAGS, BadRow, Columns, excerpt

OWN_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "tool_calls",
    "system_tag": "system",
}
"""What this format calls things, where the user does not say."""


def read(row: Mapping[str, Any], columns: Columns) -> Example:
    """One row as an Example; raises BadRow."""
    tags = {tag: OWN_TAGS[tag] if name == TAGS[tag] else name for tag, name in columns.tags.items()}
    turns = columns.need(row, "messages")
    if not isinstance(turns, list):
        raise BadRow(f"{columns.name('messages')!r} is not a list", excerpt(turns))
    messages = [_message(turn, tags, f"message {nth}") for nth, turn in enumerate(turns, 1)]
    return conversation(row, columns, messages, lambda value, meaning: _choice(value, tags, meaning))


def _message(turn: Any, tags: Mapping[str, str], where: str) -> Message:
    if not isinstance(turn, Mapping) or tags["role_tag"] not in turn:
        sharegpt = isinstance(turn, Mapping) and "from" in turn and "value" in turn
        cure = "; with from and value it is formatting: sharegpt" if sharegpt else ""
        raise BadRow(f"a message without {tags['role_tag']!r}{cure}", f"{where}: {excerpt(turn)}")
    roles = {tags[f"{role}_tag"]: role for role in ("user", "assistant", "observation", "system")}
    known = roles | {"developer": "system", "function": "observation"}
    role = turn[tags["role_tag"]]
    if not isinstance(role, str) or role not in known:
        raise BadRow("unknown role", f"{where}: {excerpt(role)} is none of {', '.join(known)}")
    text, media = content(turn.get(tags["content_tag"]), where)
    calls = turn.get(tags["function_tag"])
    if not calls:
        return Message(known[role], text, loss_weight(turn, where), media)
    if known[role] != "assistant":
        raise BadRow("tool calls outside an assistant message", where)
    written = json.dumps([_call(call, where) for call in calls], ensure_ascii=False)
    # The words that part text from calls are those templates expect in a function turn.
    said = f"{text}<tool_call>{written}</tool_call>" if text else written
    return Message("function", said, loss_weight(turn, where), media)


def _call(call: Any, where: str) -> dict[str, Any]:
    """Name and arguments of one call; arguments written as a string of JSON are read, not escaped again."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise BadRow("a tool call without a name", f"{where}: {excerpt(call)}")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise BadRow("arguments of a tool call that are not JSON", f"{where}: {excerpt(arguments)}") from None
    return {"name": function["name"], "arguments": arguments}


def _choice(value: Any, tags: Mapping[str, str], meaning: str) -> Message:
    if isinstance(value, str):
        return Message("assistant", value)
    if isinstance(value, list):
        if len(value) != 1:
            raise BadRow(f"{meaning} is not one message", excerpt(value))
        value = value[0]
    return _message(value, tags, meaning)
