"""Ling 2: the calls of Qwen, another preamble."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.data.tool_jinja import TAGGED_CALLS, WRAPPED_LINES, ToolJinja, says
from luthier.data.tool_text import describe_wrapped, read_tagged, write_tagged
from luthier.data.tools import Definition

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
JINJA = ToolJinja(describe=says(_BEFORE) + WRAPPED_LINES + says(_AFTER), call=TAGGED_CALLS)


def describe(tools: Sequence[Definition], date: str) -> str:
    """See ToolFormat."""
    return describe_wrapped(_BEFORE, tools, _AFTER)


call = write_tagged
parse = read_tagged
