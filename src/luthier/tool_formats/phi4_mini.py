"""Phi-4-mini: a JSON list after the word `functools`."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.core.types import Call
from luthier.data.tool_jinja import ToolJinja, each_call, each_tool, json_call, says
from luthier.data.tool_text import as_dict, as_json, json_calls
from luthier.data.tools import Definition, Parsed

JOINT = "\n"
_MARK = "functools["
JINJA = ToolJinja(
    describe=says("<|tool|>[") + each_tool("{{ (', ' if not loop.first else '') + tool|tojson }}") + says("]<|/tool|>"),
    call=says("functools[") + each_call(json_call(), joint=", ") + says("]"),
)


def describe(tools: Sequence[Definition], date: str) -> str:
    """See ToolFormat."""
    return f"<|tool|>{as_json(list(tools))}<|/tool|>"


def call(calls: Sequence[Call]) -> str:
    """See ToolFormat."""
    return "functools" + as_json([as_dict(call) for call in calls])


def parse(text: str, tools: Sequence[Definition] = ()) -> Parsed:
    """See ToolFormat."""
    at = text.find(_MARK)
    calls = json_calls(text[at + len(_MARK) - 1 :]) if at >= 0 else None
    return (text, []) if calls is None else (text[:at], calls)
