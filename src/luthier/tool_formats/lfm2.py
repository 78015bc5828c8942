"""LFM2: calls as Python writes them, in a list between two tokens."""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Sequence
from typing import Any

from luthier.core.errors import TemplateError
from luthier.core.types import Call
from luthier.data.tool_jinja import ToolJinja, each_argument, each_call, each_tool, says
from luthier.data.tool_text import as_json, named, outside
from luthier.data.tools import Definition, Parsed

JOINT = ""
_CALLS = re.compile(r"<\|tool_call_start\|>(.*?)<\|tool_call_end\|>", re.DOTALL)
_CONSTANTS = {"true": True, "false": False, "null": None}
JINJA = ToolJinja(
    describe=says("List of tools: <|tool_list_start|>[")
    + each_tool("{{ (', ' if not loop.first else '') + tool|tojson }}")
    + says("]<|tool_list_end|>"),
    call=says("<|tool_call_start|>[")
    + each_call(
        "{{ call['name'] + '(' }}" + each_argument("{{ name + '=' + value|tojson }}", joint=", ") + says(")"),
        joint=", ",
    )
    + says("]<|tool_call_end|>"),
)


def describe(tools: Sequence[Definition], date: str) -> str:
    """See ToolFormat."""
    return f"List of tools: <|tool_list_start|>{as_json(list(tools))}<|tool_list_end|>"


def call(calls: Sequence[Call]) -> str:
    """See ToolFormat."""
    return f"<|tool_call_start|>[{', '.join(_written(call) for call in calls)}]<|tool_call_end|>"


def _written(call: Call) -> str:
    for name in (*call.name.split("."), *named(call)):
        if not name.isidentifier() or keyword.iskeyword(name):
            raise TemplateError(f"LFM2 calls tools as Python does, and {name!r} in {call.name!r} is no Python name.")
    return f"{call.name}({', '.join(f'{name}={as_json(value)}' for name, value in named(call).items())})"


def parse(text: str, tools: Sequence[Definition] = ()) -> Parsed:
    """See ToolFormat."""
    calls: list[Call] = []
    blocks = list(_CALLS.finditer(text))
    for block in blocks:
        try:
            tree = ast.parse(block[1].strip(), mode="eval").body
            calls += [_call(node) for node in (tree.elts if isinstance(tree, ast.List) else [tree])]
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            return text, []
    return outside(text, [block.span() for block in blocks]), calls


def _call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args or any(argument.arg is None for argument in node.keywords):
        raise ValueError("not a call by names")
    name = ast.unparse(node.func)
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError("not a name")
    return Call(name, {str(given.arg): _value(given.value) for given in node.keywords})


def _value(node: ast.expr) -> Any:
    """What a literal says, in Python's words or in JSON's."""
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.List):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        if None in node.keys:
            raise ValueError("not a literal")
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values) if key is not None}
    return ast.literal_eval(node)
