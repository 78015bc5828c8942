"""Mistral since v0.3: a list of calls as JSON. The token `[TOOL_CALLS]` before it belongs to the templates."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.core.types import Call
from luthier.data.tool_jinja import WRAPPED, ToolJinja, each_call, each_tool, json_call, says
from luthier.data.tool_text import as_dict, as_json, json_calls
from luthier.data.tools import Definition, Parsed, wrapped_definition

JOINT = ""
JINJA = ToolJinja(
    describe=says("[AVAILABLE_TOOLS] [")
    + each_tool("{{ (', ' if not loop.first else '') + " + WRAPPED + "|tojson }}")
    + says("][/AVAILABLE_TOOLS]"),
    call=says("[") + each_call(json_call(), joint=", ") + says("]"),
)


def describe(tools: Sequence[Definition], date: str) -> str:
    """See ToolFormat."""
    return f"[AVAILABLE_TOOLS] {as_json([wrapped_definition(tool) for tool in tools])}[/AVAILABLE_TOOLS]"


def call(calls: Sequence[Call]) -> str:
    """See ToolFormat."""
    return as_json([as_dict(call) for call in calls])


def parse(text: str, tools: Sequence[Definition] = ()) -> Parsed:
    """See ToolFormat."""
    lead, marker, rest = text.rpartition("[TOOL_CALLS]")
    calls = json_calls(rest.strip())
    return (text, []) if calls is None else (lead if marker else "", calls)
