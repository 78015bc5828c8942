"""MiniMax-M1: one JSON object a line inside `<tool_calls>`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from luthier.core.types import Call
from luthier.data.tool_jinja import ToolJinja, each_call, each_tool, json_call, says
from luthier.data.tool_text import as_dict, as_json, json_calls
from luthier.data.tools import Definition, Parsed

JOINT = "\n"
_CALLS = re.compile(r"<tool_calls>\s*(.*?)\s*</tool_calls>(?=\s*\Z)", re.DOTALL)
_BEFORE = "You are provided with these tools:\n<tools>\n"
_AFTER = (
    "</tools>\n\nIf you need to call tools, please respond with <tool_calls></tool_calls> XML tags, and provide "
    'tool-name and json-object of arguments, following the format below:\n<tool_calls>\n{"name": <tool-name-1>, '
    '"arguments": <args-json-object-1>}\n...\n</tool_calls>'
)
JINJA = ToolJinja(
    describe=says(_BEFORE) + each_tool("{{ tool|tojson + '\\n' }}") + says(_AFTER),
    call=says("<tool_calls>\n") + each_call(json_call(), joint="\n") + says("\n</tool_calls>"),
)


def describe(tools: Sequence[Definition], date: str) -> str:
    """See ToolFormat."""
    return _BEFORE + "".join(as_json(tool) + "\n" for tool in tools) + _AFTER


def call(calls: Sequence[Call]) -> str:
    """See ToolFormat."""
    lines = "\n".join(as_json(as_dict(call)) for call in calls)
    return f"<tool_calls>\n{lines}\n</tool_calls>"


def parse(text: str, tools: Sequence[Definition] = ()) -> Parsed:
    """See ToolFormat."""
    found = _CALLS.search(text)
    if found is None:
        return text, []
    lines = [json_calls(line) for line in found[1].split("\n") if line.strip()]
    if None in lines:
        return text, []
    return text[: found.start()], [call for line in lines if line is not None for call in line]
