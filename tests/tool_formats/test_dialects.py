"""Every dialect, against texts written by hand from the models' documentation, and as pairs of inverses."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.errors import TemplateError
from luthier.core.registry import names
from luthier.core.types import Call
from luthier.data.tools import tool_format

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
WRAPPED = json.dumps({"type": "function", "function": WEATHER})
BARE = json.dumps(WEATHER)
CALL = Call("weather", {"city": "Zürich", "days": [1, 2]})
NOW = Call("now", {})
ONE_CALL = {"glm4"}

_HERMES = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n" + WRAPPED + "\n</tools>\n\n"
)
_RETURN_JSON = (
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
    'tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)

DESCRIBED = {
    "default": (
        "You have access to the following tools:\n"
        "> Tool Name: weather\nTool Description: Looks outside.\nTool Args:\n"
        "  - city (string, required): Where\n"
        "  - unit (string): , should be one of [C, F]\n"
        "  - days (array): , where each item should be integer\n\n"
        "Use the following format if using a tool:\n```\n"
        "Action: tool name (one of [weather])\n"
        "Action Input: the input to the tool, in a JSON format representing the kwargs "
        '(e.g. ```{"input": "hello world", "num_beams": 5}```)\n```\n'
    ),
    "qwen": "\n\n" + _HERMES + _RETURN_JSON,
    "ling": _HERMES + _RETURN_JSON + "\ndetailed thinking off",
    "llama3": (
        "Cutting Knowledge Date: December 2023\nToday Date: 1 May 2030\n\nYou have access to the following functions. "
        "To call a function, please respond with JSON for a function call. Respond in the format "
        '{"name": function name, "parameters": dictionary of argument name and its value}. Do not use variables.\n\n'
        + json.dumps({"type": "function", "function": WEATHER}, indent=4)
        + "\n\n"
    ),
    "mistral": f"[AVAILABLE_TOOLS] [{WRAPPED}][/AVAILABLE_TOOLS]",
    "glm4": (
        "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱 AI 公司训练的语言模型 GLM-4 模型开发的，"
        "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具\n\n## weather\n\n"
        + json.dumps(WEATHER, indent=4)
        + "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
    ),
    "glm4_moe": (
        "\n\n" + _HERMES + "For each function call, output the function name and arguments within the following XML "
        "format:\n<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>\n"
        "<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n...\n</tool_call>\n"
    ),
    "qwen3_5": (
        "\n\n# Tools\n\nYou have access to the following functions:\n\n<tools>\n" + BARE + "\n</tools>\n\n"
        "If you choose to call a function ONLY reply in the following format with NO suffix:\n\n<tool_call>\n"
        "<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
        "<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\nmultiple lines\n"
        "</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n- Function calls MUST follow the specified "
        "format: an inner <function=...></function> block must be nested within <tool_call></tool_call> XML tags\n"
        "- Required parameters MUST be specified\n- You may provide optional reasoning for your function call in "
        "natural language BEFORE the function call, but NOT after\n- If there is no function call available, answer "
        "the question like normal with your current knowledge and do not tell the user about function calls\n"
        "</IMPORTANT>"
    ),
    "seed_oss": (
        "system\nYou are Doubao, a helpful AI assistant. You may call one or more functions to assist with the user "
        "query.Tool List:\nYou are authorized to use the following tools (described in JSON Schema format). Before "
        "performing any task, you must decide how to call them based on the descriptions and parameters of these "
        "tools.\n[" + BARE + "]\n工具调用请遵循如下格式:\n<seed:tool_call>\n<function=example_function_name>\n"
        "<parameter=example_parameter_1>value_1</parameter>\n<parameter=example_parameter_2>This is the value for the "
        "second parameter\nthat can span\nmultiple lines</parameter>\n</function>\n</seed:tool_call>\n"
    ),
    "minimax1": (
        "You are provided with these tools:\n<tools>\n" + BARE + "\n</tools>\n\nIf you need to call tools, please "
        "respond with <tool_calls></tool_calls> XML tags, and provide tool-name and json-object of arguments, "
        'following the format below:\n<tool_calls>\n{"name": <tool-name-1>, "arguments": <args-json-object-1>}\n...\n'
        "</tool_calls>"
    ),
    "minimax2": (
        "\n\n# Tools\n\nYou may call one or more tools to assist with the user query.\nHere are the tools available in "
        "JSONSchema format:\n\n<tools>\n<tool>" + BARE + "</tool>\n</tools>\n\nWhen making tool calls, use XML format "
        'to invoke tools and pass parameters:\n\n<minimax:tool_call>\n<invoke name="tool-name-1">\n'
        '<parameter name="param-key-1">param-value-1</parameter>\n'
        '<parameter name="param-key-2">param-value-2</parameter>\n...\n</invoke>\n</minimax:tool_call>'
    ),
    "lfm2": "List of tools: <|tool_list_start|>[" + BARE + "]<|tool_list_end|>",
    "phi4_mini": "<|tool|>[" + BARE + "]<|/tool|>",
    "gemma4": (
        '<|tool>declaration:weather{description:<|"|>Looks outside.<|"|>,parameters:{properties:{'
        'city:{description:<|"|>Where<|"|>,type:<|"|>STRING<|"|>},'
        'days:{items:{type:<|"|>INTEGER<|"|>},type:<|"|>ARRAY<|"|>},'
        'unit:{enum:[<|"|>C<|"|>,<|"|>F<|"|>],type:<|"|>STRING<|"|>}},'
        'required:[<|"|>city<|"|>],type:<|"|>OBJECT<|"|>}}<tool|>'
    ),
}

_WEATHER_JSON = '{"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2]}}'
_NOW_JSON = '{"name": "now", "arguments": {}}'
_TAGGED = (f"<tool_call>\n{_WEATHER_JSON}\n</tool_call>", f"\n<tool_call>\n{_NOW_JSON}\n</tool_call>")
WRITTEN = {
    "default": ('Action: weather\nAction Input: {"city": "Zürich", "days": [1, 2]}', "\nAction: now\nAction Input: {}"),
    "qwen": _TAGGED,
    "ling": _TAGGED,
    "llama3": ('{"name": "weather", "parameters": {"city": "Zürich", "days": [1, 2]}}', None),
    "mistral": (f"[{_WEATHER_JSON}]", None),
    "glm4": ('weather\n{"city": "Zürich", "days": [1, 2]}', None),
    "glm4_moe": (
        "\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Zürich</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>[1, 2]</arg_value>\n</tool_call>",
        "\n<tool_call>now\n</tool_call>",
    ),
    "qwen3_5": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nZürich\n</parameter>\n<parameter=days>\n[1, 2]\n"
        "</parameter>\n</function>\n</tool_call>",
        "\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    ),
    "seed_oss": (
        "\n<seed:tool_call>\n<function=weather>\n<parameter=city>Zürich</parameter>\n<parameter=days>[1, 2]</parameter>"
        "\n</function>\n</seed:tool_call>",
        "\n\n<seed:tool_call>\n<function=now>\n</function>\n</seed:tool_call>",
    ),
    "minimax1": (f"<tool_calls>\n{_WEATHER_JSON}\n</tool_calls>", None),
    "minimax2": (
        '\n<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Zürich</parameter>\n'
        '<parameter name="days">[1, 2]</parameter>\n</invoke>\n</minimax:tool_call>',
        None,
    ),
    "lfm2": ('<|tool_call_start|>[weather(city="Zürich", days=[1, 2])]<|tool_call_end|>', None),
    "phi4_mini": (f"functools[{_WEATHER_JSON}]", None),
    "gemma4": (
        '<|tool_call>call:weather{city:<|"|>Zürich<|"|>,days:[1,2]}<tool_call|>',
        "<|tool_call>call:now{}<tool_call|>",
    ),
}
"""One call, and what a second one adds where it simply stands behind the first."""

TOGETHER = {
    "llama3": (
        '[{"name": "weather", "parameters": {"city": "Zürich", "days": [1, 2]}}, {"name": "now", "parameters": {}}]'
    ),
    "mistral": f"[{_WEATHER_JSON}, {_NOW_JSON}]",
    "minimax1": f"<tool_calls>\n{_WEATHER_JSON}\n{_NOW_JSON}\n</tool_calls>",
    "minimax2": (
        '\n<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Zürich</parameter>\n'
        '<parameter name="days">[1, 2]</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>'
    ),
    "lfm2": '<|tool_call_start|>[weather(city="Zürich", days=[1, 2]), now()]<|tool_call_end|>',
    "phi4_mini": f"functools[{_WEATHER_JSON}, {_NOW_JSON}]",
}

NAMES = names("tool_formats")
LEADS = sorted(set(NAMES) - {"llama3", "glm4"})
"""Dialects that know text beside a call."""


def test_the_tables_are_complete():
    assert set(NAMES) == set(DESCRIBED) == set(WRITTEN)
    assert {name for name, (_, more) in WRITTEN.items() if more is None} == set(TOGETHER) | ONE_CALL


@pytest.mark.parametrize("name", NAMES)
def test_a_list_of_tools(name):
    assert tool_format(name).describe([WEATHER], "1 May 2030") == DESCRIBED[name]


@pytest.mark.parametrize("name", NAMES)
def test_tools_with_little_said_about_them(name):
    text = tool_format(name).describe([{"name": "now"}, {"name": "then", "parameters": {"properties": {}}}], "")
    assert text.count("now") >= 1
    assert "then" in text
    assert "None" not in text


@pytest.mark.parametrize("name", NAMES)
def test_a_call(name):
    assert tool_format(name).call([CALL]) == WRITTEN[name][0]


@pytest.mark.parametrize("name", sorted(set(NAMES) - ONE_CALL))
def test_two_calls(name):
    expected = TOGETHER.get(name) or "".join(WRITTEN[name])
    assert tool_format(name).call([CALL, NOW]) == expected
    assert tool_format(name).parse(expected, [WEATHER]) == ("", [CALL, NOW])


def test_glm4_has_no_parallel_calls():
    with pytest.raises(TemplateError, match="one call"):
        tool_format("glm4").call([CALL, CALL])


@pytest.mark.parametrize("name", LEADS)
def test_text_before_a_call_is_kept(name):
    text = "[TOOL_CALLS]" if name == "mistral" else ""
    content, calls = tool_format(name).parse("I look <here>.\n" + text + WRITTEN[name][0], [WEATHER])
    assert (content.rstrip("\n"), calls) == ("I look <here>.", [CALL])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "It is 20 degrees.",
        "{}",
        "[]",
        "[1]",
        '{"name": 1, "arguments": {}}',
        "weather\nis fine",
        "<tool_call>",
        "<tool_call>\n{</tool_call>",
        "Action: weather\nAction Input: {",
        "<tool_calls>\nno\n</tool_calls>",
        "<minimax:tool_call>no</minimax:tool_call>",
        "<seed:tool_call><function=f</seed:tool_call>",
        "<|tool_call_start|>[f(x)]<|tool_call_end|>",
        "<|tool_call_start|>[f(x={[1]: 2})]<|tool_call_end|>",
        "<|tool_call_start|>[__import__('os').system(x='ls')]<|tool_call_end|>",
        "functools[no]",
        '<|tool_call>call:f{x:<|"|>}<tool_call|>',
        "<|tool_call>call:f{x:[1,{y:}]}<tool_call|>",
        "[" * 100_000,
    ],
)
def test_what_is_no_call_is_text(name, text):
    assert tool_format(name).parse(text) == (text, [])


def test_the_words_of_a_tag_may_stand_inside_an_argument():
    call = Call("f", {"x": "</tool_call>\n<tool_call>{}"})
    assert tool_format("qwen").parse(tool_format("qwen").call([call, call])) == ("", [call, call])


@pytest.mark.parametrize("name", ["qwen3_5", "seed_oss", "minimax2", "glm4_moe"])
def test_a_schema_tells_texts_from_numbers(name):
    tools = [{"name": "f", "parameters": {"properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}}]
    call = Call("f", {"a": "12", "b": 12})
    text = tool_format(name).call([call])
    assert tool_format(name).parse(text, tools) == ("", [call])
    assert tool_format(name).parse(text) == ("", [Call("f", {"a": 12, "b": 12})])


@pytest.mark.parametrize("name", ["default", "gemma4"])
@pytest.mark.parametrize(
    "parameters",
    [
        '{"type": "object"}',
        {"properties": {"a": "a text"}},
        {"properties": ["a"]},
        {"properties": {"a": {"type": "array", "items": ["string"]}}},
        {"properties": {"a": {}}, "required": True},
        {"properties": {"a": {"properties": {"b": None}}}},
    ],
)
def test_parameters_that_are_no_schema_are_refused_where_it_is_put_into_words(name, parameters):
    with pytest.raises(TemplateError, match="'weather' are no JSON Schema"):
        tool_format(name).describe([{"name": "weather", "parameters": parameters}], "26 Jul 2024")


def test_gemma4_writes_what_is_no_parameter_as_its_makers_do():
    """Their template takes every key of an object without properties for a parameter; `false` has no type."""
    inner = {"type": "object", "additionalProperties": False}
    written = tool_format("gemma4").describe([{"name": "f", "parameters": {"properties": {"o": inner}}}], "26 Jul 2024")
    assert '{additionalProperties:{type:<|"|><|"|>}}' in written


@pytest.mark.parametrize("name", ["qwen3_5", "seed_oss", "minimax2", "glm4_moe", "lfm2", "gemma4"])
def test_arguments_without_names_cannot_be_written(name):
    with pytest.raises(TemplateError, match="expected an object"):
        tool_format(name).call([Call("f", [1, 2])])


@pytest.mark.parametrize(
    ("name", "arguments", "why"),
    [
        ("lfm2", {"not a name": 1}, "no Python name"),
        ("lfm2", {"class": 1}, "no Python name"),
        ("gemma4", {"a:b": 1}, "without quotes"),
        ("gemma4", {"a": 'x<|"|>y'}, "cannot stand in one"),
    ],
)
def test_what_a_dialect_cannot_write_is_refused(name, arguments, why):
    with pytest.raises(TemplateError, match=why):
        tool_format(name).call([Call("f", arguments)])


WORDS = st.text(
    st.one_of(st.sampled_from(" \"'\\,:{}[]()=é你\u2028"), st.characters(exclude_categories=["Cs"])), max_size=20
)
PLAIN = WORDS.filter(lambda text: "<" not in text)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**15), 10**15), st.floats(allow_nan=False, allow_infinity=False)
)
KEYS = st.from_regex(r"[a-z]{1,6}_[0-9]", fullmatch=True)


def values(text):
    return st.recursive(
        st.one_of(SCALARS, text),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
        max_leaves=6,
    )


def calls_of(text):
    return st.lists(st.builds(Call, KEYS, st.dictionaries(KEYS, values(text), max_size=4)), min_size=1, max_size=3)


def schema_of(calls):
    """What would tell the texts among the arguments."""
    return [
        {
            "name": call.name,
            "parameters": {
                "properties": {k: {"type": "string"} for k, v in call.arguments.items() if isinstance(v, str)}
            },
        }
        for call in calls
    ]


@pytest.mark.parametrize(
    "name", sorted({"default", "qwen", "ling", "llama3", "mistral", "minimax1", "phi4_mini", "lfm2"})
)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(calls=calls_of(PLAIN))
def test_reading_is_the_inverse_of_writing(name, calls):
    assert tool_format(name).parse(tool_format(name).call(calls)) == ("", calls)


@pytest.mark.parametrize("name", ["glm4", "gemma4", "glm4_moe", "qwen3_5", "seed_oss", "minimax2"])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(calls=calls_of(PLAIN))
def test_reading_with_schemas_is_the_inverse_of_writing(name, calls):
    for call in calls:  # one name has one schema, so each call for itself
        text = tool_format(name).call([call])
        assert tool_format(name).parse(text, schema_of([call])) == ("", [call])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(text=st.text(max_size=60))
def test_nothing_in_a_reply_raises(name, text):
    dialect = tool_format(name)
    for written in (text, WRITTEN[name][0].replace("Zürich", text), WRITTEN[name][0][: len(text)] + text):
        content, calls = dialect.parse(written)
        assert isinstance(content, str)
        assert all(isinstance(call, Call) for call in calls)
