"""Seed-OSS: as Qwen 3.5, with its own tags and no line breaks around values."""

from __future__ import annotations

import re
from collections.abc import Sequence

from luthier.core.types import Call
from luthier.data.tool_text import as_json, as_value, named, outside, typed
from luthier.data.tools import Definition, Parsed

JOINT = ""
_CALL = re.compile(r"\n*<seed:tool_call>\s*<function=([^>\n]+)>(.*?)</function>\s*</seed:tool_call>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>(.*?)</parameter>", re.DOTALL)


def describe(tools: Sequence[Definition], date: str) -> str:
    """See ToolFormat."""
    return (
        "system\nYou are Doubao, a helpful AI assistant. You may call one or more functions to assist with the user "
        "query.Tool List:\nYou are authorized to use the following tools (described in JSON Schema format). Before "
        "performing any task, you must decide how to call them based on the descriptions and parameters of these "
        f"tools.\n{as_json(list(tools))}\n工具调用请遵循如下格式:\n<seed:tool_call>\n<function=example_function_name>\n"
        "<parameter=example_parameter_1>value_1</parameter>\n<parameter=example_parameter_2>This is the value for the "
        "second parameter\nthat can span\nmultiple lines</parameter>\n</function>\n</seed:tool_call>\n"
    )


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
    found = list(_CALL.finditer(text))
    calls = [Call(one[1], typed(_PARAMETER.findall(one[2]), tools, one[1])) for one in found]
    return outside(text, [one.span() for one in found]), calls
