"""Ling 2: the calls of Qwen, another preamble."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.core.types import Call
from luthier.data.tool_jinja import WRAPPED, ToolJinja, each_call, each_tool, json_call, says
from luthier.data.tool_text import as_json, read_tagged, write_tagged
from luthier.data.tools import Definition, Parsed, wrapped_definition

JOINT = "\n"
_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}'
    "\n</tool_call>\ndetailed thinking off"
)
JINJA = ToolJinja(
    describe=says(_BEFORE) + each_tool("{{ '\\n' + " + WRAPPED + "|tojson }}") + says(_AFTER),
    call=each_call(says("<tool_call>\n") + json_call() + says("\n</tool_call>"), joint="\n"),
)


def describe(tools: Sequence[Definition], date: str) -> str:
    """See ToolFormat."""
    return _BEFORE + "".join("\n" + as_json(wrapped_definition(tool)) for tool in tools) + _AFTER


def call(calls: Sequence[Call]) -> str:
    """See ToolFormat."""
    return write_tagged(calls)


def parse(text: str, tools: Sequence[Definition] = ()) -> Parsed:
    """See ToolFormat."""
    return read_tagged(text)
