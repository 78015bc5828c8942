"""Calls in plain words, `Action:` and `Action Input:`, for models that were trained with no dialect of their own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from luthier.core.types import Call
from luthier.data.tool_text import as_json, leading_json, outside
from luthier.data.tools import Definition, Parsed

JOINT = "\n"
_ACTION = re.compile(r"Action:[ \t]*(\S+)[ \t]*\n[ \t]*Action Input:[ \t]*")


def describe(tools: Sequence[Definition], date: str) -> str:
    """See ToolFormat."""
    text = "".join(
        f"> Tool Name: {tool['name']}\nTool Description: {tool.get('description', '')}\n"
        f"Tool Args:\n{''.join(_parameters(tool))}\n"
        for tool in tools
    )
    names = ", ".join(tool["name"] for tool in tools)
    return (
        f"You have access to the following tools:\n{text}Use the following format if using a tool:\n```\n"
        f"Action: tool name (one of [{names}])\n"
        "Action Input: the input to the tool, in a JSON format representing the kwargs "
        '(e.g. ```{"input": "hello world", "num_beams": 5}```)\n```\n'
    )


def _parameters(tool: Definition) -> Iterator[str]:
    schema = tool.get("parameters") or {}
    for name, parameter in (schema.get("properties") or {}).items():
        required = ", required" if name in (schema.get("required") or ()) else ""
        choices = ", ".join(map(str, parameter.get("enum") or ()))
        enum = f", should be one of [{choices}]" if choices else ""
        items = f", where each item should be {parameter['items'].get('type', '')}" if parameter.get("items") else ""
        kind, text = parameter.get("type", ""), parameter.get("description", "")
        yield f"  - {name} ({kind}{required}): {text}{enum}{items}\n"


def call(calls: Sequence[Call]) -> str:
    """See ToolFormat."""
    return "\n".join(f"Action: {call.name}\nAction Input: {as_json(call.arguments)}" for call in calls)


def parse(text: str, tools: Sequence[Definition] = ()) -> Parsed:
    """See ToolFormat."""
    calls: list[Call] = []
    spans: list[tuple[int, int]] = []
    for found in _ACTION.finditer(text):
        value = leading_json(text, found.end())
        if value is not None and (not spans or found.start() >= spans[-1][1]):
            calls.append(Call(found[1], value[0]))
            spans.append((found.start(), value[1]))
    return outside(text, spans), calls
