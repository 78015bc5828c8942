"""The chat template that is saved with a model, as servers render it, against the prompts that training saw."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
from jinja2 import TemplateError as JinjaError

from luthier.core.errors import ConfigError
from luthier.core.registry import _plugins, names, use_plugins
from luthier.core.types import Message
from luthier.data.renderer import make_renderer
from luthier.data.template import TemplateConfig, find_template
from luthier.data.tools import tool_format
from tests.templates.test_catalogue import SHAPES

TOOLS = [
    {
        "name": "weather",
        "description": 'Looks "outside" {{ x }}\'s.',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Wo, 你?"},
                "unit": {"type": "string", "enum": ["C", 1, None]},
                "days": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["city"],
        },
    },
    {"name": "now", "description": "Tells the time."},
    {"name": "bare", "parameters": None},
]
WRAPPED = [{"type": "function", "function": tool} for tool in TOOLS]
CALLS = [
    {"name": "weather", "arguments": {"city": 'Zürich\'s "alt"\n', "days": [1, 2], "x": None, "items": True}},
    {"name": "now", "arguments": {}},
]
WRITTEN = sorted(name for name in names("tool_formats") if tool_format(name).JINJA is not None)
MUTE = sorted(set(names("tool_formats")) - set(WRITTEN))
REASONING = [name for name in SHAPES if find_template(name).reasoning]
TOKENS = {
    "default": "chatml", "qwen": "qwen3", "qwen3_5": "qwen3_5", "llama3": "llama3", "glm4": "glm4",
    "mistral": "mistral",
    "glm4_moe": "glm4_moe", "minimax1": "minimax1", "minimax2": "minimax2", "phi4_mini": "phi4_mini",
    "seed_oss": "seed_oss", "lfm2": "lfm2", "ling": "bailing_v2",
}  # fmt: skip
"""A template of each dialect."""


def several(dialect):
    """As many calls as a turn of this dialect holds."""
    return CALLS[:1] if dialect == "glm4" else CALLS


def talk_of(template, *, thought="", text=""):
    """(our messages, a server's messages): calls after a text and a thought, two results, an answer, a question."""
    calls = several(template.tool_format)
    before, after = template.tool_call_words
    lead = thought + text
    content = (
        lead + "".join(f"{before}{json.dumps(call)}{after}" for call in calls) if text else thought + json.dumps(calls)
    )
    ours = [
        Message("user", "U1 {{ x }} it's \\n"),
        Message("function", content),
        *[Message("observation", f"R{nth}") for nth, _ in enumerate(calls)],
        Message("assistant", thought + "A1\n"),
        Message("user", "U2"),
        Message("assistant", "A2"),
    ]
    theirs = [
        {"role": "user", "content": "U1 {{ x }} it's \\n"},
        {
            "role": "assistant",
            "content": lead or None,
            "tool_calls": [{"type": "function", "function": c} for c in calls],
        },
        *[{"role": "tool", "content": f"R{nth}"} for nth, _ in enumerate(calls)],
        {"role": "assistant", "content": thought + "A1\n"},
        {"role": "user", "content": "U2"},
        {"role": "assistant", "content": "A2"},
    ]
    return ours, theirs


def served(tok, talk, system="", **given):
    messages = [{"role": "system", "content": system}] * bool(system) + talk
    return tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **given)


@pytest.mark.parametrize("name", SHAPES)
def test_a_server_asks_with_tools_as_training_asked(name, tok):
    template = find_template(name)
    if tool_format(template.tool_format).JINJA is None:
        return
    renderer = make_renderer(TemplateConfig(template=name, date_string="1 May 2030"), tok)
    thought = "hm".join(template.thought_words) if template.reasoning else ""
    for system, text in itertools.product(("", "S"), ("", "So:")):
        ours, theirs = talk_of(template, thought=thought, text=text)
        for stop in (1, len(ours) - 3, len(ours) - 1):
            asked = renderer.prompt(ours[:stop], system=system, tools=json.dumps(TOOLS))
            for tools in (WRAPPED, TOOLS)[: 1 + (not system and not text)]:
                assert served(tok, theirs[:stop], system, tools=tools) == tok.decode(asked)


@pytest.mark.parametrize("dialect", WRITTEN)
def test_token_by_token(dialect, tok):
    renderer = make_renderer(TemplateConfig(template=TOKENS[dialect], tool_format=dialect), tok)
    ours, theirs = talk_of(renderer.template)
    ids = tok.apply_chat_template(theirs[:-1], tools=WRAPPED, add_generation_prompt=True)["input_ids"]
    assert ids == renderer.prompt(ours[:-1], tools=json.dumps(TOOLS))
    whole = tok.apply_chat_template(theirs[:2], tools=WRAPPED)["input_ids"]
    source, response = renderer.oneturn(ours[:2], tools=json.dumps(TOOLS))
    if renderer.template.reasoning:  # what a server shows of the last turn is what was said, without an empty thought
        return
    assert whole == source + response


@pytest.mark.parametrize("name", REASONING)
@pytest.mark.parametrize("enable", [True, False, None])
@pytest.mark.parametrize("preserve", [False, True])
def test_a_server_treats_thoughts_as_training_did(name, enable, preserve, tok):
    renderer = make_renderer(TemplateConfig(template=name, enable_thinking=enable, preserve_thinking=preserve), tok)
    other = copy.deepcopy(tok)
    other.chat_template = None
    make_renderer(TemplateConfig(template=name, enable_thinking=not enable, preserve_thinking=not preserve), other)
    before, after = find_template(name).thought_words
    half = before.strip() or before
    answers = [
        f"{before}T{after}\n\nA",
        "A",
        f"{half}A",
        f"A{after}",
        f"{before}T{before}U{after}A{before}V{after}{after}B",
    ]
    ours, theirs = [], []
    for nth, answer in enumerate(answers):
        ours += [Message("user", f"U{nth}"), Message("assistant", answer)]
        theirs += [{"role": "user", "content": f"U{nth}"}, {"role": "assistant", "content": answer}]
        asked = tok.decode(renderer.prompt(ours[: 2 * nth + 1]))
        assert served(tok, theirs[: 2 * nth + 1]) == asked
        own = {"enable_thinking": enable, "preserve_thinking": preserve}
        assert served(other, theirs[: 2 * nth + 1], **own) == asked  # what a server says wins over what was trained


@pytest.mark.parametrize("name", REASONING)
@pytest.mark.parametrize("preserve", [False, True])
def test_a_conversation_that_ends_with_the_model_shows_what_it_said(name, preserve, tok):
    template = find_template(name)
    renderer = make_renderer(TemplateConfig(template=name, preserve_thinking=preserve), tok)
    empty = "".join(template.thought_words) if template.empty_thought is None else template.empty_thought
    thought = "hm".join(template.thought_words)
    for last in ("A2", thought + "A2"):
        ours = [Message("user", "U1"), Message("assistant", thought + "A1"), Message("user", "U2")]
        source, said = (tok.decode(part) for part in renderer.oneturn([*ours, Message("assistant", last)]))
        theirs = [{"role": message.role, "content": message.content} for message in ours]
        text = tok.apply_chat_template([*theirs, {"role": "assistant", "content": last}], tokenize=False)
        assert text == source + (said if last != "A2" else said.replace(empty, "", 1))


def test_a_thought_that_comes_apart(tok):
    make_renderer(TemplateConfig(template="qwen3", preserve_thinking=True), tok)
    talk = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A", "reasoning_content": "hm"}]
    assert "<think>\nhm\n</think>\n\nA<|im_end|>" in served(tok, [*talk, talk[0]])
    assert "hm" not in served(tok, [*talk, talk[0]], preserve_thinking=False)


class TestRefusals:
    """Nothing vanishes in silence."""

    @pytest.mark.parametrize("dialect", MUTE)
    def test_tools_of_a_dialect_without_jinja(self, dialect, tok):
        make_renderer(TemplateConfig(template="chatml", tool_format=dialect), tok)
        talk = [{"role": "user", "content": "U"}]
        assert served(tok, talk)
        with pytest.raises(JinjaError, match=f"dialect, {dialect}"):
            served(tok, talk, tools=WRAPPED)
        call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALLS[0]}]}
        with pytest.raises(JinjaError, match=f"dialect, {dialect}"):
            served(tok, [*talk, call])

    @pytest.mark.parametrize(
        ("name", "talk", "why"),
        [
            ("chatml", [{"role": "user", "content": "U"}, {"role": "poet", "content": "P"}], "role poet"),
            ("gemma", [{"role": "user", "content": "U"}, {"role": "system", "content": "P"}], "role system"),
            ("gemma", [{"role": "system", "content": "S"}, {"role": "assistant", "content": "A"}], "must come first"),
        ],
    )
    def test_messages_without_a_place(self, name, talk, why, tok):
        make_renderer(TemplateConfig(template=name), tok)
        with pytest.raises(JinjaError, match=why):
            served(tok, talk)

    @pytest.mark.parametrize("calls", [[], CALLS])
    def test_glm4_writes_one_call(self, calls, tok):
        make_renderer(TemplateConfig(template="glm4"), tok)
        said = {"role": "assistant", "content": "", "tool_calls": calls}
        talk = [{"role": "user", "content": "U"}, said]
        if calls:
            with pytest.raises(JinjaError, match="one call"):
                served(tok, talk)

    def test_arguments_as_text_where_each_has_a_tag(self, tok):
        make_renderer(TemplateConfig(template="qwen3_5"), tok)
        call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "{}"}]}
        with pytest.raises(JinjaError, match="must be an object"):
            served(tok, [{"role": "user", "content": "U"}, call])


def test_arguments_as_text_are_json_already(tok):
    make_renderer(TemplateConfig(template="qwen"), tok)
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}]}
    assert '{"name": "f", "arguments": {"a": 1}}' in served(tok, [{"role": "user", "content": "U"}, call])


def test_the_day_is_told_by_the_server_or_by_the_run(tok):
    make_renderer(TemplateConfig(template="llama3", date_string="1 May 2030"), tok)
    talk = [{"role": "user", "content": "U"}]
    assert "Today Date: 1 May 2030\n" in served(tok, talk, tools=WRAPPED)
    assert "Today Date: 2 May 2030\n" in served(tok, talk, tools=WRAPPED, date_string="2 May 2030")


def test_a_dialect_that_lacks_a_part_is_named(tmp_path):
    (tmp_path / "tool_formats").mkdir()
    (tmp_path / "tool_formats" / "half.py").write_text("JOINT = ''\n")
    use_plugins(tmp_path)
    try:
        with pytest.raises(ConfigError, match=r"half\.py has no JINJA, describe, call, parse"):
            tool_format("half")
    finally:
        _plugins.clear()
