"""The order of turns that chat templates can render."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.core.errors import TemplateError
from luthier.core.types import Message


def check_order(messages: Sequence[Message], *, response_last: bool, template: str) -> None:
    """Turns of user (or observation) and assistant (or function) must alternate, beginning with the former."""
    sides = (("user", "observation"), ("assistant", "function"))
    wrong = next((i for i, message in enumerate(messages) if message.role not in sides[i % 2]), None)
    if wrong is not None:
        raise TemplateError(
            f"template {template!r}: message {wrong + 1} of {len(messages)} is from {messages[wrong].role!r}, expected "
            f"{' or '.join(sides[wrong % 2])} (turns alternate; the system prompt is given apart)."
        )
    if not messages or len(messages) % 2 == response_last:
        last = "a response (assistant or function)" if response_last else "a user or observation message"
        raise TemplateError(f"template {template!r}: {len(messages)} messages; they must end with {last}.")
