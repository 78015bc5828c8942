"""Llama 3.1 and later, with its tools in the system prompt: a reply that is nothing but JSON."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.core.types import Call
from luthier.data.tool_jinja import WRAPPED, ToolJinja, each_call, each_tool, json_call, says
from luthier.data.tool_text import as_dict, as_json, json_calls
from luthier.data.tools import Definition, Parsed, wrapped_definition

JOINT = ""
_HOW = (
    "\n\nYou have access to the following functions. To call a function, please respond with JSON for a function "
    'call. Respond in the format {"name": function name, "parameters": dictionary of argument name and its '
    "value}. Do not use variables.\n\n"
)
_KNOWS = "Cutting Knowledge Date: December 2023\nToday Date: "
_MANY = "m['tool_calls']|length > 1"
JINJA = ToolJinja(
    describe=f"{says(_KNOWS)}{{{{ date_string }}}}{says(_HOW)}"
    + each_tool("{{ " + WRAPPED + "|tojson(indent=4) + '\\n\\n' }}"),
    call=f"{{{{ '[' if {_MANY} else '' }}}}"
    + each_call(json_call("parameters"), joint=", ")
    + f"{{{{ ']' if {_MANY} else '' }}}}",
)


def describe(tools: Sequence[Definition], date: str) -> str:
    """See ToolFormat."""
    listing = "".join(as_json(wrapped_definition(tool), indent=4) + "\n\n" for tool in tools)
    return _KNOWS + date + _HOW + listing


def call(calls: Sequence[Call]) -> str:
    """See ToolFormat."""
    written = [as_dict(call, "parameters") for call in calls]
    return as_json(written[0] if len(written) == 1 else written)


def parse(text: str, tools: Sequence[Definition] = ()) -> Parsed:
    """See ToolFormat."""
    calls = json_calls(text.strip().removeprefix("<|python_tag|>"), key="parameters")
    return (text, []) if calls is None else ("", calls)
