"""Qwen 3.5 and Qwen3-Coder: a function tag with a tag per parameter, inside `<tool_call>`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from luthier.core.types import Call
from luthier.data.tool_jinja import VALUE, ToolJinja, each_argument, each_call, each_tool, says
from luthier.data.tool_text import as_json, as_value, named, read_matches
from luthier.data.tools import Definition, Parsed

JOINT = "\n\n"
_CALL = re.compile(r"<tool_call>\s*<function=([^>\n]+)>(.*?)</function>\s*</tool_call>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_BEFORE = "\n\n# Tools\n\nYou have access to the following functions:\n\n<tools>"
_AFTER = (
    "\n</tools>\n\n"
    "If you choose to call a function ONLY reply in the following format with NO suffix:\n\n"
    "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
    "<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\nmultiple lines\n"
    "</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n"
    "- Function calls MUST follow the specified format: an inner <function=...></function> block must be nested "
    "within <tool_call></tool_call> XML tags\n- Required parameters MUST be specified\n"
    "- You may provide optional reasoning for your function call in natural language BEFORE the function call, "
    "but NOT after\n- If there is no function call available, answer the question like normal with your current "
    "knowledge and do not tell the user about function calls\n</IMPORTANT>"
)
_PARAMETER_IN_JINJA = "{{ '<parameter=' + name + '>\\n' + " + VALUE + " + '\\n</parameter>\\n' }}"
JINJA = ToolJinja(
    describe=says(_BEFORE) + each_tool("{{ '\\n' + tool|tojson }}") + says(_AFTER),
    call=each_call(
        "{{ '<tool_call>\\n<function=' + call['name'] + '>\\n' }}"
        + each_argument(_PARAMETER_IN_JINJA)
        + says("</function>\n</tool_call>"),
        joint="\n",
    ),
)


def describe(tools: Sequence[Definition], date: str) -> str:
    """See ToolFormat."""
    return _BEFORE + "".join("\n" + as_json(tool) for tool in tools) + _AFTER


def call(calls: Sequence[Call]) -> str:
    """See ToolFormat."""
    return "\n".join(
        f"<tool_call>\n<function={call.name}>\n{_parameters(call)}</function>\n</tool_call>" for call in calls
    )


def _parameters(call: Call) -> str:
    return "".join(f"<parameter={name}>\n{as_value(value)}\n</parameter>\n" for name, value in named(call).items())


def parse(text: str, tools: Sequence[Definition] = ()) -> Parsed:
    """See ToolFormat."""
    return read_matches(text, list(_CALL.finditer(text)), _PARAMETER, tools)
