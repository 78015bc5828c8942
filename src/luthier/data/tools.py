"""Tools: what may be called, what was called, and how a model's reply is taken apart again.

How definitions and calls are written is a dialect, one file in `luthier/tool_formats/` each: `describe` gives the text
that lists the tools, `call` the text of calls, and `parse` is the inverse of `call`.

A `function` message holds JSON: an object or a list of objects `{"name": ..., "arguments": {...}}`. It may stand after
a thought, or inside `<tool_call>` tags with text before it; that text is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol, cast

from luthier.core.errors import ConfigError, TemplateError
from luthier.core.registry import find, miss, names
from luthier.core.types import Call, Reply
from luthier.data.tool_jinja import ToolJinja

Definition = dict[str, Any]
"""A function as OpenAI's API describes it, without the `{"type": "function"}` around it."""


Parsed = tuple[str, list[Call]]
"""The text beside the calls, and the calls."""


class ToolFormat(Protocol):
    """What a module in `luthier/tool_formats/` brings."""

    JOINT: str
    """What stands between text and the calls after it, if the text does not end with a blank itself."""
    JINJA: ToolJinja | None
    """`describe` and `call` for the chat template that is saved with a model; None: it refuses tools."""

    def describe(self, tools: Sequence[Definition], date: str) -> str:
        """The text that lists the tools; it follows the system prompt."""

    def call(self, calls: Sequence[Call]) -> str:
        """The text of these calls. Raises TemplateError for what the dialect cannot write."""

    def parse(self, text: str, tools: Sequence[Definition] = ()) -> Parsed:
        """A reply taken apart: (text, calls). What cannot be read as calls is text; nothing raises. `tools` tell
        texts from numbers where the dialect does not."""


_PARTS = ("JOINT", "JINJA", "describe", "call", "parse")


@cache
def tool_format(name: str) -> ToolFormat:
    """The dialect of this name; ConfigError lists what there is."""
    known = names("tool_formats")
    if name not in known:
        raise ConfigError(f"tool_format: {miss('tool format', name, known)}")
    module = find("tool_formats", name)
    missing = [part for part in _PARTS if part not in vars(module)]
    if missing:
        raise ConfigError(f"tool_format: {module.__file__} has no {', '.join(missing)}; see docs/templates.md.")
    return cast(ToolFormat, module)


def read_definitions(text: str) -> list[Definition]:
    """Tool definitions from JSON text, each without its `{"type": "function"}` wrapper."""
    try:
        tools = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and bottomless nesting
        raise TemplateError(f"tools: not JSON ({error}): {_short(text)}. Expected a list of functions.") from error
    tools = tools if isinstance(tools, list) else [tools]
    bare = [tool.get("function", tool) if isinstance(tool, dict) else tool for tool in tools]
    for tool in bare:
        if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
            raise TemplateError(f"tools: {_short(json.dumps(tool))} is no function with a name.")
    return bare


def read_calls(content: str, thought: tuple[str, str], wrapper: tuple[str, str]) -> tuple[str, list[Call]]:
    """The text before the calls and the calls in the content of a `function` message."""
    wrapped = re.compile(_between(wrapper), re.DOTALL)
    bodies = wrapped.findall(content)
    if bodies:
        lead = wrapped.sub("", content)
        return (lead if lead.strip() else ""), [call for body in bodies for call in _calls(body, content)]
    found = re.search(_between(thought), content, re.DOTALL)
    lead = found.group(0) if found else ""
    return lead, _calls(content.replace(lead, "", 1), content)


def write_calls(dialect: ToolFormat, lead: str, calls: Sequence[Call]) -> str:
    """The text before the calls and the calls, as this dialect writes them."""
    joint = dialect.JOINT if lead and not lead[-1].isspace() else ""
    return lead + joint + dialect.call(calls)


def read_reply(text: str, dialect: ToolFormat, thought: tuple[str, str], tools: Sequence[Definition] = ()) -> Reply:
    """A model's reply as thought, text and calls. A thought may lack its opening word, where the prompt ended with
    it."""
    opening, closing = (word.strip() for word in thought)
    before, closed, after = text.partition(closing)
    thinking, rest = (before.replace(opening, "", 1).strip(), after.lstrip("\n")) if closed else ("", text)
    content, calls = dialect.parse(rest, tools)
    if calls and dialect.JOINT:
        content = content.removesuffix(dialect.JOINT)
    return Reply(thinking, content, tuple(calls))


def wrapped_definition(tool: Definition) -> Definition:
    """The OpenAI form, which most dialects print."""
    return {"type": "function", "function": tool}


def _calls(text: str, content: str) -> list[Call]:
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TemplateError(
            f"a function message must be JSON such as "
            f'{{"name": "add", "arguments": {{"a": 1}}}}, got {_short(content)} ({error}).'
        ) from error
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise TemplateError(f"a function message needs 'name' (text) and 'arguments', got {_short(content)}.")
    return [Call(call["name"], _arguments(call["arguments"])) for call in calls]


def _arguments(value: Any) -> Any:
    """OpenAI writes the arguments as a string of JSON; printing that again would escape it a second time."""
    if not isinstance(value, str):
        return value
    try:
        inner = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return inner if isinstance(inner, dict) else value


def _between(words: tuple[str, str]) -> str:
    return f"{re.escape(words[0])}(.*?){re.escape(words[1])}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 120 else text[:117] + "...")
