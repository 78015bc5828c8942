"""Definitions, calls in data and calls in replies; the dialects have tests of their own in tests/tool_formats."""

from __future__ import annotations

import json

import pytest

from luthier.core.errors import ConfigError, TemplateError
from luthier.core.types import Call, Message, Reply
from luthier.data.renderer import make_renderer
from luthier.data.template import TemplateConfig
from luthier.data.tools import read_calls, read_definitions, read_reply, tool_format, write_calls
from tests.conftest import build_tokenizer

WEATHER = {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}
WRAPPED = {"type": "function", "function": WEATHER}
THINK, WRAP = ("<think>\n", "\n</think>\n\n"), ("<tool_call>", "</tool_call>")


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


NESTED, DIGITS = "[" * 100_000, "1" * 5000
"""Python's json module raises RecursionError for the one and ValueError for the other."""


@pytest.mark.parametrize(
    "content",
    ["call f(1)", '{"name": "f"}', '"f"', '[{"arguments": {}}]', '{"name": 5, "arguments": {}}', NESTED, DIGITS],
)
def test_calls_that_cannot_be_read(content):
    with pytest.raises(TemplateError, match="function message"):
        read_calls(content, THINK, WRAP)


@pytest.mark.parametrize("text", [NESTED, DIGITS])
def test_arguments_in_a_string_that_is_no_json_stay_a_string(text):
    assert read_calls(json.dumps({"name": "f", "arguments": text}), THINK, WRAP) == ("", [Call("f", text)])


@pytest.mark.parametrize("text", ["weather", "[1]", '[{"type": "function"}]', NESTED, DIGITS])
def test_definitions_that_cannot_be_read(text):
    with pytest.raises(TemplateError, match="tools"):
        read_definitions(text)


@pytest.mark.parametrize("given", [[WEATHER], [WRAPPED], WEATHER])
def test_definitions_with_and_without_wrapper(given):
    assert read_definitions(json.dumps(given)) == [WEATHER]


def test_an_unknown_dialect_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'qwen3_5'"):
        tool_format("qwen35")


@pytest.mark.parametrize(
    ("dialect", "lead", "expected"),
    [
        ("qwen", "I look.", "I look.\n<tool_call>"),
        ("qwen", "I look.\n", "I look.\n<tool_call>"),
        ("qwen", "<think>\nhm\n</think>\n\n", "<think>\nhm\n</think>\n\n<tool_call>"),
        ("qwen", "", "<tool_call>"),
        ("qwen3_5", "I look.", "I look.\n\n<tool_call>"),
        ("glm4_moe", "I look.", "I look.\n<tool_call>"),
    ],
)
def test_text_before_calls(dialect, lead, expected):
    assert write_calls(tool_format(dialect), lead, [Call("f", {})]).startswith(
        expected + "\n" * (dialect != "glm4_moe")
    )


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("Hello <b>", Reply("", "Hello <b>", ())),
        ("<think>\nhm\n</think>\n\nHello", Reply("hm", "Hello", ())),
        ("\n</think>\n\nHello", Reply("", "Hello", ())),
        ("hm\n</think>\n\nHello", Reply("hm", "Hello", ())),
        (
            "<think>\nhm\n</think>\n\nI look.\n"
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>',
            Reply("hm", "I look.", (Call("weather", {"city": "Ulm"}),)),
        ),
    ],
)
def test_a_reply_taken_apart(text, reply):
    assert read_reply(text, tool_format("qwen"), THINK) == reply


def test_renderers_take_replies_apart():
    tokenizer = build_tokenizer()
    renderer = make_renderer(TemplateConfig(template="qwen3_5"), tokenizer)
    text = "<tool_call>\n<function=weather>\n<parameter=city>\n12\n</parameter>\n</function>\n</tool_call>"
    assert renderer.reply(text).calls == (Call("weather", {"city": 12}),)
    assert renderer.reply(text, tools=json.dumps([WEATHER])).calls == (Call("weather", {"city": "12"}),)


def test_in_the_system_prompt():
    tok = build_tokenizer()
    renderer = make_renderer(TemplateConfig(template="qwen"), tok)
    text = tok.decode(renderer.prompt([Message("user", "U")], system="S", tools=json.dumps([WEATHER])))
    described = tool_format("qwen").describe([WEATHER], "")
    assert text == (
        f"<|im_start|>system\nS{described}<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_empty_list_of_tools_is_none():
    tok = build_tokenizer()
    renderer = make_renderer(TemplateConfig(template="qwen"), tok)
    assert renderer.prompt([Message("user", "U")], tools="[]") == renderer.prompt([Message("user", "U")])


def test_several_results_stand_side_by_side_where_the_template_knows_how():
    tok = build_tokenizer()
    call = Message("function", '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]')
    talk = [Message("user", "U"), call, Message("observation", "1"), Message("observation", "2")]
    qwen = tok.decode(make_renderer(TemplateConfig(template="qwen3_nothink"), tok).prompt(talk))
    assert qwen.endswith(
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    chatml = tok.decode(make_renderer(TemplateConfig(template="chatml"), tok).prompt(talk))
    assert chatml.endswith("<|im_start|>tool\n1<|im_end|>\n<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n")
    plain = tok.decode(make_renderer(TemplateConfig(template="vicuna", replace_eos=None), tok).prompt(talk))
    assert plain.endswith("USER: 1\n2 ASSISTANT:")
