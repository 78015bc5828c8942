"""What all formats end with: the messages of a row, in order, become a prompt and what is answered to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from luthier.core.types import Answer, Example, Message
from luthier.data.media import with_images
from luthier.data.source import BadRow, Columns, excerpt
from luthier.data.turns import RESPONSES


def conversation(
    row: Mapping[str, Any], columns: Columns, messages: Sequence[Message], choice: Callable[[Any, str], Message]
) -> Example:
    """An Example of a row's messages; raises BadRow.

    Turns may stand in any order; whether a template can write it is for the template to say. A leading system message
    outranks the system column. A conversation that does not end with a turn of the model has no answer of its own;
    with `ranking` it is answered by the columns chosen and rejected, which `choice(value, meaning)` reads.
    """
    turns, system = with_images(row, columns, messages), columns.text(row, "system")
    if turns and turns[0].role == "system":
        system = turns.pop(0).content
    if not turns:
        raise BadRow("empty conversation")
    for nth, message in enumerate(turns, 1):
        if message.weight and message.role not in RESPONSES:
            raise BadRow("a loss weight on a turn that the model does not speak", f"turn {nth}, of {message.role}")
    answered = turns[-1].role in RESPONSES
    answers: tuple[Answer, ...] = ()
    if columns.ranking:
        if answered:
            raise BadRow("wrong order of roles", "before chosen and rejected must come a user turn")
        answers = tuple(
            Answer((_spoken(choice(columns.need(row, meaning), meaning), meaning),), score, meaning)
            for meaning, score in (("chosen", 1.0), ("rejected", 0.0))
        )
    elif answered:
        answers = (Answer((_spoken(turns.pop(), "response"),), _liked(row, columns)),)
    return Example(tuple(turns), answers, system, tools_text(row, columns))


def answered(example: Example) -> Example:
    """A conversation that ends with words to the model, up to the last of its own: nothing is learnt of what follows.

    As it is, where it has an answer already or the model says nothing in it.
    """
    spoken = [nth for nth, message in enumerate(example.prompt) if message.role in RESPONSES and message.content]
    if example.answers or not spoken:
        return example
    *before, last = example.prompt[: spoken[-1] + 1]
    return replace(example, prompt=tuple(before), answers=(Answer((last,)),))


def tools_text(row: Mapping[str, Any], columns: Columns) -> str:
    """The tool definitions of a row as JSON text, empty if there are none."""
    tools = columns.get(row, "tools") or ""
    return tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)


def loss_weight(turn: Mapping[str, Any], where: str) -> float | None:
    """The loss weight a message carries as `weight` or `loss` (0, 1, true, false or between), None if none."""
    found = {key: turn[key] for key in ("weight", "loss") if turn.get(key) is not None}
    for key, weight in found.items():
        if not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise BadRow(f"a message {key} that is not a number of 0 or more", f"{where}: {excerpt(weight)}")
    if len({float(weight) for weight in found.values()}) > 1:
        raise BadRow("a message with a weight and a loss that differ", f"{where}: {excerpt(found)}")
    return next((float(weight) for weight in found.values()), None)


def _spoken(message: Message, meaning: str) -> Message:
    if message.role not in RESPONSES:
        raise BadRow("wrong order of roles", f"{meaning} is a {message.role} message, expected assistant or function")
    if not message.content:
        raise BadRow(f"empty {meaning}")
    return message


def _liked(row: Mapping[str, Any], columns: Columns) -> float:
    """The score of an answer with a thumb up (1) or down (-1); NaN where the data set has no such column."""
    if columns.name("kto_tag") is None:
        return float("nan")
    liked = columns.need(row, "kto_tag")
    if not isinstance(liked, bool):
        raise BadRow(f"{columns.name('kto_tag')!r} is not true or false", excerpt(liked))
    return 1.0 if liked else -1.0
