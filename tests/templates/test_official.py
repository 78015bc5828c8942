"""Our templates against the chat templates of the models, rendered by Hugging Face."""

from __future__ import annotations

import copy
import json

import pytest

from luthier.core.types import Message
from luthier.data.renderer import make_renderer
from luthier.data.template import TemplateConfig
from tests.templates import official

TALK = (
    Message("user", "What is\n 1 + 1?"),
    Message("assistant", "It is 2."),
    Message("user", "é 你好?"),
    Message("assistant", "Yes:\n\n  {x}"),
)
SAME = {
    "chatml": (official.CHATML, "<|im_end|>"),
    "cohere": (official.COHERE, "<|END_OF_TURN_TOKEN|>"),
    "deepseek3": (official.DEEPSEEK3, "</s>"),
    "gemma": (official.GEMMA3, "<eos>"),
    "gemma3": (official.GEMMA3, "<eos>"),
    "granite3": (official.GRANITE3, "<|end_of_text|>"),
    "intern2": (official.INTERN2, "</s>"),
    "llama3": (official.LLAMA3, "<|end_of_text|>"),
    "mistral": (official.MISTRAL, "</s>"),
    "phi4": (official.PHI4, "<|im_end|>"),
    "qwen": (official.QWEN25, "<|im_end|>"),
    "qwen3_nothink": (official.CHATML, "<|im_end|>"),
    "smollm2": (official.SMOLLM2, "<|im_end|>"),
    "yi": (official.CHATML, "<|im_end|>"),
}


def as_dicts(messages, system=""):
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return ([{"role": "system", "content": system}] if system else []) + turns


def bind(tok, name, **keys):
    tok = copy.deepcopy(tok)
    return make_renderer(TemplateConfig(template=name, **keys), tok)


def flat(pairs):
    return [token for pair in pairs for part in pair for token in part]


@pytest.fixture
def vendor(tok, request):
    """A tokenizer with the chat template and the eos of a model's maker."""
    tok.chat_template, tok.eos_token = SAME[request.param]
    return request.param, tok


@pytest.mark.parametrize("vendor", sorted(SAME), indirect=True)
def test_text_of_a_conversation(vendor):
    name, tok = vendor
    renderer = bind(tok, name)
    text = tok.apply_chat_template(as_dicts(TALK, "Be brief."), tokenize=False)
    assert tok.decode(flat(renderer.pairs(TALK, system="Be brief."))) == text


@pytest.mark.parametrize("vendor", sorted(SAME), indirect=True)
def test_prompt_is_the_one_a_server_builds(vendor):
    name, tok = vendor
    served = tok.apply_chat_template(as_dicts(TALK[:3], "Be brief."), add_generation_prompt=True)["input_ids"]
    assert bind(tok, name).prompt(TALK[:3], system="Be brief.") == served
    assert bind(tok, None).prompt(TALK[:3], system="Be brief.") == served


@pytest.mark.parametrize("vendor", sorted(SAME), indirect=True)
def test_the_own_chat_template_trains_the_same_ids(vendor):
    name, tok = vendor
    ours, own = bind(tok, name), bind(tok, None)
    assert own.pairs(TALK, system="S") == ours.pairs(TALK, system="S")
    assert own.oneturn(TALK, system="S") == ours.oneturn(TALK, system="S")
    assert set(own.stop_ids) >= {ours.pairs(TALK)[0][1][-1]} - set(tok.encode("\n", add_special_tokens=False))


def test_qwen_with_tools(tok):
    tok.chat_template = official.QWEN25
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "int"}}}}}]
    talk = (
        TALK[0],
        Message("function", '{"name": "add", "arguments": {"a": "ü"}}'),
        Message("observation", "2"),
        TALK[1],
    )
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": "ü"}}}
    dicts = [
        {"role": "user", "content": talk[0].content},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": talk[3].content},
    ]
    text = tok.apply_chat_template(dicts, tools=tools, tokenize=False)
    for renderer in (bind(tok, "qwen"), bind(tok, None)):
        pairs = renderer.pairs(talk, tools=json.dumps(tools))
        assert tok.decode(flat(pairs)) == text
        assert renderer.prompt(talk[:3], tools=json.dumps(tools)) == flat(pairs[:1]) + pairs[1][0]


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("answer", ["A", "<think>\nhm\n</think>\n\nA"])
def test_qwen3_as_the_own_template_has_it(tok, thinking, answer):
    tok.chat_template = official.QWEN3
    answer = answer if thinking else "A"
    talk = (TALK[0], TALK[1], TALK[2], Message("assistant", answer))
    text = tok.apply_chat_template(as_dicts(talk), tokenize=False)
    asked = tok.apply_chat_template(
        as_dicts(talk[:3]), tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    for renderer in (bind(tok, "qwen3", enable_thinking=thinking), bind(tok, None, enable_thinking=thinking)):
        pairs = renderer.pairs(talk, mask_history=True)
        assert tok.decode(flat(pairs)) == text
        source, response = renderer.oneturn(talk)
        assert (tok.decode(source), tok.decode(source + response)) == (asked, text)
        assert tok.decode(renderer.prompt(talk[:3])) == asked
