"""GLM-4.5 and later: each argument between tags of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence

from luthier.core.types import Call
from luthier.data.tool_jinja import VALUE, WRAPPED_LINES, ToolJinja, each_argument, each_call, says
from luthier.data.tool_text import as_value, describe_wrapped, named, read_matches
from luthier.data.tools import Definition, Parsed

JOINT = ""
_CALL = re.compile(r"\n?<tool_call>([^<\n]+)\n?(.*?)</tool_call>", re.DOTALL)
_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_BEFORE = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_AFTER = (
    "\n</tools>\n\nFor each function call, output the function name and arguments within the following XML format:\n"
    "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>\n"
    "<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n...\n</tool_call>\n"
)
_ARGUMENT_IN_JINJA = "{{ '<arg_key>' + name + '</arg_key>\\n<arg_value>' + " + VALUE + " + '</arg_value>\\n' }}"
JINJA = ToolJinja(
    describe=says(_BEFORE) + WRAPPED_LINES + says(_AFTER),
    call=each_call(
        "{{ '\\n<tool_call>' + call['name'] + '\\n' }}" + each_argument(_ARGUMENT_IN_JINJA) + says("</tool_call>")
    ),
)


def describe(tools: Sequence[Definition], date: str) -> str:
    """See ToolFormat."""
    return describe_wrapped(_BEFORE, tools, _AFTER)


def call(calls: Sequence[Call]) -> str:
    """See ToolFormat."""
    return "".join(f"\n<tool_call>{call.name}\n{_arguments(call)}</tool_call>" for call in calls)


def _arguments(call: Call) -> str:
    return "".join(
        f"<arg_key>{name}</arg_key>\n<arg_value>{as_value(value)}</arg_value>\n" for name, value in named(call).items()
    )


def parse(text: str, tools: Sequence[Definition] = ()) -> Parsed:
    """See ToolFormat."""
    found = [one for one in _CALL.finditer(text) if not _ARGUMENT.sub("", one[2]).strip()]
    return read_matches(text, found, _ARGUMENT, tools)
