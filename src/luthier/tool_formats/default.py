"""Calls in plain words, `Action:` and `Action Input:`, for models that were trained with no dialect of their own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from luthier.core.types import Call
from luthier.data.tool_jinja import ARGUMENTS, ToolJinja, each_call, each_tool, says
from luthier.data.tool_text import as_json, leading_json, outside, schema_of
from luthier.data.tools import Definition, Parsed

JOINT = "\n"
_ACTION = re.compile(r"Action:[ \t]*(\S+)[ \t]*\n[ \t]*Action Input:[ \t]*")
_BEFORE = "You have access to the following tools:\n"
_HOW = "Use the following format if using a tool:\n```\nAction: tool name (one of ["
_AFTER = (
    "])\nAction Input: the input to the tool, in a JSON format representing the kwargs "
    '(e.g. ```{"input": "hello world", "num_beams": 5}```)\n```\n'
)
_PARAMETERS_IN_JINJA = (
    "{% set schema = tool.get('parameters') or {} %}"
    "{% for name, parameter in (schema.get('properties') or {}).items() %}"
    "{% set items = parameter.get('items') %}{% set enum = (parameter.get('enum') or [])|join(', ') %}"
    "{{ '  - ' ~ name ~ ' (' ~ (parameter.get('type') or '') }}"
    "{{ (', required' if name in (schema.get('required') or []) else '') ~ '): ' }}"
    "{{ (parameter.get('description') or '') ~ (', should be one of [' ~ enum ~ ']' if enum else '') }}"
    "{{ (', where each item should be ' ~ items.get('type', '') if items else '') ~ '\\n' }}{% endfor %}"
)
JINJA = ToolJinja(
    describe=says(_BEFORE)
    + each_tool(
        "{{ '> Tool Name: ' ~ tool['name'] ~ '\\nTool Description: ' ~ (tool.get('description') or '') }}"
        + says("\nTool Args:\n")
        + _PARAMETERS_IN_JINJA
        + says("\n")
    )
    + says(_HOW)
    + each_tool("{{ (', ' if not loop.first else '') ~ tool['name'] }}")
    + says(_AFTER),
    call=each_call("{{ 'Action: ' + call['name'] + '\\nAction Input: ' + " + ARGUMENTS + " }}", joint="\n"),
)


def describe(tools: Sequence[Definition], date: str) -> str:
    """See ToolFormat."""
    text = "".join(
        f"> Tool Name: {tool['name']}\nTool Description: {tool.get('description') or ''}\n"
        f"Tool Args:\n{''.join(_parameters(tool))}\n"
        for tool in tools
    )
    return _BEFORE + text + _HOW + ", ".join(tool["name"] for tool in tools) + _AFTER


def _parameters(tool: Definition) -> Iterator[str]:
    schema = schema_of(tool)
    for name, parameter in (schema.get("properties") or {}).items():
        required = ", required" if name in (schema.get("required") or ()) else ""
        choices = ", ".join(map(str, parameter.get("enum") or ()))
        enum = f", should be one of [{choices}]" if choices else ""
        items = f", where each item should be {parameter['items'].get('type', '')}" if parameter.get("items") else ""
        kind, text = parameter.get("type") or "", parameter.get("description") or ""
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
