"""Tool dialects, against texts written by hand and Qwen2.5's and Mistral's documented forms."""

from __future__ import annotations

import json

import pytest

from luthier.core.errors import TemplateError
from luthier.core.types import Message
from luthier.data.template import TemplateConfig, make_renderer
from luthier.data.tools import FORMATS, Call, read_calls, read_definitions, tool_format
from tests.conftest import build_tokenizer

WEATHER = {
    "name": "weather",
    "description": "Looks outside.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Where"},
            "unit": {"type": "string", "enum": ["C", "F"]},
            "days": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["city"],
    },
}
WRAPPED = {"type": "function", "function": WEATHER}
CALL = Call("weather", {"city": "Zürich", "days": [1, 2]})
THINK, WRAP = ("<think>\n", "\n</think>\n\n"), ("<tool_call>", "</tool_call>")


def described(name, date="26 Jul 2024"):
    return tool_format(name).describe([WEATHER], date)


def test_plain():
    assert described("default") == (
        "You have access to the following tools:\n"
        "> Tool Name: weather\nTool Description: Looks outside.\nTool Args:\n"
        "  - city (string, required): Where\n"
        "  - unit (string): , should be one of [C, F]\n"
        "  - days (array): , where each item should be integer\n\n"
        "Use the following format if using a tool:\n```\n"
        "Action: tool name (one of [weather])\n"
        "Action Input: the input to the tool, in a JSON format representing the kwargs "
        '(e.g. ```{"input": "hello world", "num_beams": 5}```)\n```\n'
    )


def test_plain_tool_without_parameters():
    assert "> Tool Name: now\nTool Description: \nTool Args:\n\n" in tool_format("default").describe(
        [{"name": "now"}], ""
    )


def test_qwen():
    assert described("qwen") == (
        "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        + json.dumps(WRAPPED)
        + "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
        "</tool_call>"
    )


def test_llama3_has_the_date_it_is_told():
    text = described("llama3", "1 May 2030")
    assert text.startswith("Cutting Knowledge Date: December 2023\nToday Date: 1 May 2030\n\nYou have access")
    assert text.endswith("Do not use variables.\n\n" + json.dumps(WRAPPED, indent=4) + "\n\n")
    assert '{"name": function name, "parameters": dictionary of argument name and its value}. Do not' in text


def test_mistral():
    assert described("mistral") == "[AVAILABLE_TOOLS] " + json.dumps([WRAPPED]) + "[/AVAILABLE_TOOLS]"


def test_glm4():
    text = described("glm4")
    assert text.startswith("你是一个名为 ChatGLM 的人工智能助手。")
    assert text.endswith(
        f"# 可用工具\n\n## weather\n\n{json.dumps(WEATHER, indent=4)}\n"
        "在调用上述函数时，请使用 Json 格式表示调用的参数。"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("default", 'Action: weather\nAction Input: {"city": "Zürich", "days": [1, 2]}'),
        ("qwen", '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2]}}\n</tool_call>'),
        ("llama3", '{"name": "weather", "parameters": {"city": "Zürich", "days": [1, 2]}}'),
        ("mistral", '[{"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2]}}]'),
        ("glm4", 'weather\n{"city": "Zürich", "days": [1, 2]}'),
    ],
)
def test_a_call(name, expected):
    assert tool_format(name).call([CALL]) == expected


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"glm4"}))
def test_parallel_calls_are_all_there(name):
    text = tool_format(name).call([CALL, Call("now", {})])
    assert text.count("weather") == 1
    assert text.count("now") == 1


def test_glm4_has_no_parallel_calls():
    with pytest.raises(TemplateError, match="one call"):
        tool_format("glm4").call([CALL, CALL])


@pytest.mark.parametrize(
    ("content", "lead", "names"),
    [
        ('{"name": "f", "arguments": {"x": 1}}', "", ["f"]),
        ('[{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"x": 1}}]', "", ["f", "g"]),
        ('<think>\nhm\n</think>\n\n{"name": "f", "arguments": {"x": 1}}', "<think>\nhm\n</think>\n\n", ["f"]),
        ('I look.\n<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>', "I look.\n", ["f"]),
        (
            '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
            '<tool_call>\n{"name": "g", "arguments": {"x": 1}}\n</tool_call>',
            "",
            ["f", "g"],
        ),
    ],
)
def test_reading_calls(content, lead, names):
    assert read_calls(content, THINK, WRAP) == (lead, [Call(name, {"x": 1}) for name in names])


def test_arguments_given_as_a_string_of_json_are_not_escaped_again():
    _, calls = read_calls(json.dumps({"name": "f", "arguments": '{"x": "é"}'}), THINK, WRAP)
    assert tool_format("qwen").call(calls) == '<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>'


@pytest.mark.parametrize("content", ["call f(1)", '{"name": "f"}', '"f"', '[{"arguments": {}}]'])
def test_calls_that_cannot_be_read(content):
    with pytest.raises(TemplateError, match="function message"):
        read_calls(content, THINK, WRAP)


@pytest.mark.parametrize("text", ["weather", "[1]", '[{"type": "function"}]'])
def test_definitions_that_cannot_be_read(text):
    with pytest.raises(TemplateError, match="tools"):
        read_definitions(text)


@pytest.mark.parametrize("given", [[WEATHER], [WRAPPED], WEATHER])
def test_definitions_with_and_without_wrapper(given):
    assert read_definitions(json.dumps(given)) == [WEATHER]


def test_in_the_system_prompt():
    tok = build_tokenizer()
    renderer = make_renderer(TemplateConfig(template="qwen"), tok)
    text = tok.decode(renderer.prompt([Message("user", "U")], system="S", tools=json.dumps([WEATHER])))
    assert text == (
        f"<|im_start|>system\nS{described('qwen')}<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    )
