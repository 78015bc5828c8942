"""MiniMax-M2: an `<invoke>` per call with a tag per parameter, all inside `<minimax:tool_call>`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from luthier.core.types import Call
from luthier.data.tool_jinja import VALUE, ToolJinja, each_argument, each_call, each_tool, says
from luthier.data.tool_text import as_json, as_value, named, outside, typed
from luthier.data.tools import Definition, Parsed

JOINT = ""
_CALLS = re.compile(r"\n?<minimax:tool_call>(.*?)</minimax:tool_call>", re.DOTALL)
_CALL = re.compile(r'<invoke name="([^"\n]*)">(.*?)</invoke>', re.DOTALL)
_PARAMETER = re.compile(r'<parameter name="([^"\n]*)">(.*?)</parameter>', re.DOTALL)
_BEFORE = (
    "\n\n# Tools\n\nYou may call one or more tools to assist with the user query.\n"
    "Here are the tools available in JSONSchema format:\n\n<tools>\n"
)
_AFTER = (
    "</tools>\n\nWhen making tool calls, use XML format to invoke tools and pass parameters:\n\n<minimax:tool_call>\n"
    '<invoke name="tool-name-1">\n<parameter name="param-key-1">param-value-1</parameter>\n'
    '<parameter name="param-key-2">param-value-2</parameter>\n...\n</invoke>\n</minimax:tool_call>'
)
_PARAMETER_IN_JINJA = "{{ '<parameter name=\"' + name + '\">' + " + VALUE + " + '</parameter>\\n' }}"
JINJA = ToolJinja(
    describe=says(_BEFORE) + each_tool("{{ '<tool>' + tool|tojson + '</tool>\\n' }}") + says(_AFTER),
    call=says("\n<minimax:tool_call>\n")
    + each_call(
        "{{ '<invoke name=\"' + call['name'] + '\">\\n' }}" + each_argument(_PARAMETER_IN_JINJA) + says("</invoke>\n")
    )
    + says("</minimax:tool_call>"),
)


def describe(tools: Sequence[Definition], date: str) -> str:
    """See ToolFormat."""
    return _BEFORE + "".join(f"<tool>{as_json(tool)}</tool>\n" for tool in tools) + _AFTER


def call(calls: Sequence[Call]) -> str:
    """See ToolFormat."""
    invoked = "".join(f'<invoke name="{call.name}">\n{_parameters(call)}</invoke>\n' for call in calls)
    return f"\n<minimax:tool_call>\n{invoked}</minimax:tool_call>"


def _parameters(call: Call) -> str:
    return "".join(f'<parameter name="{name}">{as_value(value)}</parameter>\n' for name, value in named(call).items())


def parse(text: str, tools: Sequence[Definition] = ()) -> Parsed:
    """See ToolFormat."""
    blocks = list(_CALLS.finditer(text))
    calls = [
        Call(name, typed(_PARAMETER.findall(body), tools, name))
        for block in blocks
        for name, body in _CALL.findall(block[1])
    ]
    return (outside(text, [block.span() for block in blocks]), calls) if calls else (text, [])
