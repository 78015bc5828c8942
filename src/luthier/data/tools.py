"""How tools are described to a model and how its calls are written, one `ToolFormat` per dialect.

A `function` message holds JSON: an object or a list of objects `{"name": ..., "arguments": {...}}`. It may stand after
a thought, or inside `<tool_call>` tags with text before it; that text is kept. The dialects are those the models of
each family were trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.core.errors import ConfigError, TemplateError
from luthier.core.registry import miss

Definition = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a tool."""

    name: str
    arguments: Any
    """What the JSON of the arguments says, as a rule a dict."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One dialect: the text that lists the tools, appended to the system prompt, and the text of calls."""

    describe: Callable[[Sequence[Definition], str], str]
    """(bare function definitions, date) to text."""
    call: Callable[[Sequence[Call]], str]


def tool_format(name: str) -> ToolFormat:
    """The dialect of this name; ConfigError lists what there is."""
    if name not in FORMATS:
        raise ConfigError(f"tool_format: {miss('tool format', name, sorted(FORMATS))}")
    return FORMATS[name]


def read_definitions(text: str) -> list[Definition]:
    """Tool definitions from JSON text, each without its `{"type": "function"}` wrapper."""
    try:
        tools = json.loads(text)
    except json.JSONDecodeError as error:
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


def wrapped_definition(tool: Definition) -> Definition:
    """The OpenAI form, which most dialects print."""
    return {"type": "function", "function": tool}


def _calls(text: str, content: str) -> list[Call]:
    try:
        calls = json.loads(text)
    except json.JSONDecodeError as error:
        raise TemplateError(
            f"a function message must be JSON such as "
            f'{{"name": "add", "arguments": {{"a": 1}}}}, got {_short(content)} ({error}).'
        ) from error
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, dict) or "name" not in call or "arguments" not in call:
            raise TemplateError(f"a function message needs 'name' and 'arguments', got {_short(content)}.")
    return [Call(call["name"], _arguments(call["arguments"])) for call in calls]


def _arguments(value: Any) -> Any:
    """OpenAI writes the arguments as a string of JSON; printing that again would escape it a second time."""
    if not isinstance(value, str):
        return value
    try:
        inner = json.loads(value)
    except json.JSONDecodeError:
        return value
    return inner if isinstance(inner, dict) else value


def _between(words: tuple[str, str]) -> str:
    return f"{re.escape(words[0])}(.*?){re.escape(words[1])}"


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _short(text: str, most: int = 120) -> str:
    return repr(text if len(text) <= most else text[:most] + "...")


def _describe_plain(tools: Sequence[Definition], date: str) -> str:
    text = "".join(
        f"> Tool Name: {tool['name']}\nTool Description: {tool.get('description', '')}\n"
        f"Tool Args:\n{''.join(_plain_parameters(tool))}\n"
        for tool in tools
    )
    names = ", ".join(tool["name"] for tool in tools)
    return (
        f"You have access to the following tools:\n{text}Use the following format if using a tool:\n```\n"
        f"Action: tool name (one of [{names}])\n"
        "Action Input: the input to the tool, in a JSON format representing the kwargs "
        '(e.g. ```{"input": "hello world", "num_beams": 5}```)\n```\n'
    )


def _plain_parameters(tool: Definition) -> list[str]:
    schema = tool.get("parameters") or {}
    lines = []
    for name, parameter in (schema.get("properties") or {}).items():
        required = ", required" if name in (schema.get("required") or ()) else ""
        choices = ", ".join(map(str, parameter.get("enum") or ()))
        enum = f", should be one of [{choices}]" if choices else ""
        items = f", where each item should be {parameter['items'].get('type', '')}" if parameter.get("items") else ""
        kind, text = parameter.get("type", ""), parameter.get("description", "")
        lines.append(f"  - {name} ({kind}{required}): {text}{enum}{items}\n")
    return lines


def _call_plain(calls: Sequence[Call]) -> str:
    return "\n".join(f"Action: {call.name}\nAction Input: {_json(call.arguments)}" for call in calls)


def _describe_qwen(tools: Sequence[Definition], date: str) -> str:
    listing = "".join("\n" + _json(wrapped_definition(tool)) for tool in tools)
    return (
        "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>{listing}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, '
        '"arguments": <args-json-object>}\n</tool_call>'
    )


def _call_qwen(calls: Sequence[Call]) -> str:
    return "\n".join(
        f"<tool_call>\n{_json({'name': call.name, 'arguments': call.arguments})}\n</tool_call>" for call in calls
    )


def _describe_llama3(tools: Sequence[Definition], date: str) -> str:
    listing = "".join(_json(wrapped_definition(tool), indent=4) + "\n\n" for tool in tools)
    return (
        f"Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n"
        "You have access to the following functions. To call a function, please respond with JSON for a function "
        'call. Respond in the format {"name": function name, "parameters": dictionary of argument name and its '
        f"value}}. Do not use variables.\n\n{listing}"
    )


def _call_llama3(calls: Sequence[Call]) -> str:
    written = [{"name": call.name, "parameters": call.arguments} for call in calls]
    return _json(written[0] if len(written) == 1 else written)


def _describe_mistral(tools: Sequence[Definition], date: str) -> str:
    return f"[AVAILABLE_TOOLS] {_json([wrapped_definition(tool) for tool in tools])}[/AVAILABLE_TOOLS]"


def _call_mistral(calls: Sequence[Call]) -> str:
    return _json([{"name": call.name, "arguments": call.arguments} for call in calls])


def _describe_glm4(tools: Sequence[Definition], date: str) -> str:
    listing = "".join(
        f"\n\n## {tool['name']}\n\n{_json(tool, indent=4)}\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
        for tool in tools
    )
    return (
        "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱 AI 公司训练的语言模型 GLM-4 模型开发的，"
        f"你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具{listing}"
    )


def _call_glm4(calls: Sequence[Call]) -> str:
    if len(calls) != 1:
        raise TemplateError(f"GLM-4 writes one call per message, got {len(calls)}. Give each call a turn of its own.")
    return f"{calls[0].name}\n{_json(calls[0].arguments)}"


FORMATS = {
    "default": ToolFormat(_describe_plain, _call_plain),
    "qwen": ToolFormat(_describe_qwen, _call_qwen),
    "llama3": ToolFormat(_describe_llama3, _call_llama3),
    "mistral": ToolFormat(_describe_mistral, _call_mistral),
    "glm4": ToolFormat(_describe_glm4, _call_glm4),
}
