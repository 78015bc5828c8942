"""GLM-4 and ChatGLM3: the name on a line of its own, then the arguments as JSON; one call per message."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.core.errors import TemplateError
from luthier.core.types import Call
from luthier.data.tool_jinja import ARGUMENTS, ToolJinja, each_call, each_tool, refuses, says
from luthier.data.tool_text import as_json, leading_json
from luthier.data.tools import Definition, Parsed

JOINT = ""
_BEFORE = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱 AI 公司训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
)
_USE = "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
_ONE = "GLM-4 writes one call per message: give each call a turn of its own"
JINJA = ToolJinja(
    describe=says(_BEFORE)
    + each_tool("{{ '\\n\\n## ' + tool['name'] + '\\n\\n' + tool|tojson(indent=4) }}" + says(_USE)),
    call=f"{{% if m['tool_calls']|length != 1 %}}{refuses(_ONE)}{{% endif %}}"
    + each_call("{{ call['name'] + '\\n' + " + ARGUMENTS + " }}"),
)


def describe(tools: Sequence[Definition], date: str) -> str:
    """See ToolFormat."""
    return _BEFORE + "".join(f"\n\n## {tool['name']}\n\n{as_json(tool, indent=4)}{_USE}" for tool in tools)


def call(calls: Sequence[Call]) -> str:
    """See ToolFormat."""
    if len(calls) != 1:
        raise TemplateError(f"GLM-4 writes one call per message, got {len(calls)}. Give each call a turn of its own.")
    return f"{calls[0].name}\n{as_json(calls[0].arguments)}"


def parse(text: str, tools: Sequence[Definition] = ()) -> Parsed:
    """See ToolFormat."""
    name, newline, _ = text.lstrip("\n").partition("\n")
    at = len(text) - len(text.lstrip("\n")) + len(name) + 1
    found = leading_json(text, at) if newline and name and not any(letter.isspace() for letter in name) else None
    if found is None or not isinstance(found[0], dict) or text[found[1] :].strip():
        return text, []
    return "", [Call(name, found[0])]
