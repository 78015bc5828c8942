"""Seed-OSS: as Qwen 3.5, with its own tags and no line breaks around values."""

from __future__ import annotations

import re
from collections.abc import Sequence

from luthier.core.types import Call
from luthier.data.tool_jinja import VALUE, ToolJinja, each_argument, each_call, each_tool, says
from luthier.data.tool_text import as_json, as_value, named, read_matches
from luthier.data.tools import Definition, Parsed

JOINT = ""
_CALL = re.compile(r"\n*<seed:tool_call>\s*<function=([^>\n]+)>(.*?)</function>\s*</seed:tool_call>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>(.*?)</parameter>", re.DOTALL)
_BEFORE = (
    "system\nYou are Doubao, a helpful AI assistant. You may call one or more functions to assist with the user "
    "query.Tool List:\nYou are authorized to use the following tools (described in JSON Schema format). Before "
    "performing any task, you must decide how to call them based on the descriptions and parameters of these tools.\n"
)
_AFTER = (
    "\n工具调用请遵循如下格式:\n<seed:tool_call>\n<function=example_function_name>\n"
    "<parameter=example_parameter_1>value_1</parameter>\n<parameter=example_parameter_2>This is the value for the "
    "second parameter\nthat can span\nmultiple lines</parameter>\n</function>\n</seed:tool_call>\n"
)
_PARAMETER_IN_JINJA = "{{ '<parameter=' + name + '>' + " + VALUE + " + '</parameter>\\n' }}"
JINJA = ToolJinja(
    describe=says(_BEFORE + "[")
    + each_tool("{{ (', ' if not loop.first else '') + tool|tojson }}")
    + says("]" + _AFTER),
    call=each_call(
        "{{ '\\n<seed:tool_call>\\n<function=' + call['name'] + '>\\n' }}"
        + each_argument(_PARAMETER_IN_JINJA)
        + says("</function>\n</seed:tool_call>"),
        joint="\n",
    ),
)


def describe(tools: Sequence[Definition], date: str) -> str:
    """See ToolFormat."""
    return _BEFORE + as_json(list(tools)) + _AFTER


def call(calls: Sequence[Call]) -> str:
    """See ToolFormat."""
    return "\n".join(
        f"\n<seed:tool_call>\n<function={call.name}>\n{_parameters(call)}</function>\n</seed:tool_call>"
        for call in calls
    )


def _parameters(call: Call) -> str:
    return "".join(f"<parameter={name}>{as_value(value)}</parameter>\n" for name, value in named(call).items())


def parse(text: str, tools: Sequence[Definition] = ()) -> Parsed:
    """See ToolFormat."""
    return read_matches(text, list(_CALL.finditer(text)), _PARAMETER, tools)
