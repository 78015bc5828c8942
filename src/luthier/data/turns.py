"""The order of turns: which of them are the model's, and what templates can render."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from luthier.core.errors import TemplateError
from luthier.core.types import ROLES, Message

RESPONSES = ("assistant", "function")
"""The turns that a model speaks."""


def responses(messages: Sequence[Message]) -> list[int]:
    """The places of the model's turns."""
    return [place for place, message in enumerate(messages) if message.role in RESPONSES]


def join_results(messages: Sequence[Message], joint: str) -> list[Message]:
    """Observations that follow each other as one, with `joint` between their texts."""
    joined: list[Message] = []
    for message in messages:
        if message.role == "observation" and joined and joined[-1].role == "observation":
            message = replace(message, content=f"{joined.pop().content}{joint}{message.content}")
        joined.append(message)
    return joined


def check_ends(messages: Sequence[Message], *, response_last: bool, template: str) -> None:
    """A conversation begins with a turn, and ends with a response where one is trained and with something else where
    one is asked for."""
    unknown = next((message.role for message in messages if message.role not in ROLES), None)
    if unknown is not None:
        raise TemplateError(f"template {template!r}: no such role as {unknown!r}; there are: {', '.join(ROLES)}.")
    if messages and messages[0].role == "system":
        raise TemplateError(f"template {template!r}: the system prompt is given apart, not as the first message.")
    if not messages or (messages[-1].role in RESPONSES) != response_last:
        last = "a response (assistant or function)" if response_last else "a user or observation message"
        found = f"the last is from {messages[-1].role!r}" if messages else "there are none"
        raise TemplateError(f"template {template!r}: {len(messages)} messages and {found}; they must end with {last}.")


def check_alternation(messages: Sequence[Message], template: str) -> None:
    """Turns of user (or observation) and assistant (or function) must alternate, beginning with the former."""
    sides = (("user", "observation"), RESPONSES)
    wrong = next((i for i, message in enumerate(messages) if message.role not in sides[i % 2]), None)
    if wrong is not None:
        raise TemplateError(
            f"template {template!r}: message {wrong + 1} of {len(messages)} is from {messages[wrong].role!r}, expected "
            f"{' or '.join(sides[wrong % 2])} (this template needs turns that alternate; the system prompt is given "
            f"apart)."
        )
