"""A call of a tool and what it answers, in the words of each family, by hand: U1, a call, 42, A1."""

from __future__ import annotations

import pytest

from luthier.core.types import Message
from luthier.data.renderer import make_renderer
from luthier.data.template import TemplateConfig, find_template

TALK = (
    Message("user", "U1"),
    Message("function", '{"name": "f", "arguments": {"x": 1}}'),
    Message("observation", "42"),
    Message("assistant", "A1"),
)
_ACTION = 'Action: f\nAction Input: {"x": 1}'
_JSON = '{"name": "f", "arguments": {"x": 1}}'
_TAGGED = f"<tool_call>\n{_JSON}\n</tool_call>"
_ARGS = "\n<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
_ASK = "<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\n"
_ANSWER = "<|im_start|>assistant\n[[A1<|im_end|>\n]]"
_RESULT = "<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n"
_EMPTY = "<think>\n\n</think>\n\n"
_LLAMA3 = "<|start_header_id|>{}<|end_header_id|>\n\n"

WRITTEN = {
    "qwen": f"{_ASK}[[{_TAGGED}<|im_end|>\n]]{_RESULT}{_ANSWER}",
    "qwen3": f"{_ASK}[[{_EMPTY}{_TAGGED}<|im_end|>\n]]{_RESULT}{_ANSWER.replace('[[', '[[' + _EMPTY)}",
    "qwen3_5_nothink": (
        f"{_ASK}[[<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call><|im_end|>\n]]"
        f"{_RESULT}{_ANSWER}"
    ),
    "qwen2_audio": f"{_ASK}[[{_ACTION}<|im_end|>\n]]<|im_start|>user\n42<|im_end|>\n{_ANSWER}",
    "chatml": f"{_ASK}[[{_ACTION}<|im_end|>\n]]<|im_start|>tool\n42<|im_end|>\n{_ANSWER}",
    "smollm2": f"{_ASK}[[{_ACTION}<|im_end|>\n]]<|im_start|>user\n42<|im_end|>\n{_ANSWER}",
    "ernie": f"{_ASK}[[{_ACTION}<|im_end|>\n]]<|im_start|>tool\n42<|im_end|>\n{_ANSWER}".replace(
        "<|im_end|>\n", "<|im_end|>\n\n"
    ),
    "lfm2": (
        f"{_ASK}[[<|tool_call_start|>[f(x=1)]<|tool_call_end|><|im_end|>\n]]<|im_start|>tool\n"
        f"<|tool_response_start|>42<|tool_response_end|><|im_end|>\n{_ANSWER}"
    ),
    "llama3": (
        f"<s>{_LLAMA3.format('user')}U1<|eot_id|>{_LLAMA3.format('assistant')}"
        f'[[{{"name": "f", "parameters": {{"x": 1}}}}<|eot_id|>]]'
        f"{_LLAMA3.format('ipython')}42<|eot_id|>{_LLAMA3.format('assistant')}[[A1<|eot_id|>]]"
    ),
    "llama4": (
        "<s><|header_start|>user<|header_end|>\n\nU1<|eot|><|header_start|>assistant<|header_end|>\n\n"
        '[[{"name": "f", "parameters": {"x": 1}}<|eot|>]]'
        "<|header_start|>ipython<|header_end|>\n\n42<|eot|><|header_start|>assistant<|header_end|>\n\n[[A1<|eot|>]]"
    ),
    "mistral": (
        f'<s>[INST] U1[/INST][[[TOOL_CALLS] [{_JSON}]</s>]][TOOL_RESULTS] {{"content": 42}}[/TOOL_RESULTS][[ A1</s>]]'
    ),
    "ministral": (
        f'<s>[INST]U1[/INST][[[TOOL_CALLS][{_JSON}]</s>]][TOOL_RESULTS]{{"content": 42}}[/TOOL_RESULTS][[A1</s>]]'
    ),
    "mistral_small": (
        f'<s>[INST]U1[/INST][[[TOOL_CALLS][{_JSON}]</s>]][TOOL_RESULTS]{{"content": 42}}[/TOOL_RESULTS][[A1</s>]]'
    ),
    "gemma": (
        f"<s><start_of_turn>user\nU1<end_of_turn>\n<start_of_turn>model\n[[{_ACTION}<end_of_turn>\n]]"
        "<start_of_turn>tool\n42<end_of_turn>\n<start_of_turn>model\n[[A1<end_of_turn>\n]]"
    ),
    "gemma4": (
        "<s><|turn>user\nU1<turn|>\n<|turn>model\n[[<|channel>thought\n<channel|><|tool_call>call:f{x:1}<tool_call|>"
        "<turn|>\n]]<|turn>tool\n42<turn|>\n<|turn>model\n[[<|channel>thought\n<channel|>A1<turn|>\n]]"
    ),
    "glm4": '[gMASK]<sop><|user|>\nU1<|assistant|>[[f\n{"x": 1}]]<|observation|>\n42<|assistant|>[[\nA1]]',
    "chatglm3": '[gMASK]sop<|user|>\nU1<|assistant|>[[f\n{"x": 1}]]<|observation|>\n42<|assistant|>[[\nA1]]',
    "glm4_moe": (
        f"[gMASK]<sop><|user|>\nU1<|assistant|>[[{_EMPTY}{_ARGS}]]<|observation|>\n42<|assistant|>[[{_EMPTY}\nA1]]"
    ),
    "glm4_7": (
        f"[gMASK]<sop><|user|>\nU1<|assistant|>[[</think>{_ARGS}]]<|observation|>\n42<|assistant|>[[</think>\nA1]]"
    ),
    "deepseek3": f"<s><｜User｜>U1<｜Assistant｜>[[{_ACTION}</s>]]<｜User｜>42<｜Assistant｜>[[A1</s>]]",
    "youtu": (
        f"<s><|User|>U1<|Assistant|>[[{_EMPTY}{_ACTION}<|end_of_text|>]]"
        f"<tool_response>\n42\n</tool_response><|Assistant|>[[{_EMPTY}A1<|end_of_text|>]]"
    ),
    "granite4": (
        "<|start_of_role|>user<|end_of_role|>U1<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
        f"[[{_ACTION}<|end_of_text|>\n]]<|start_of_role|>tool<|end_of_role|>42<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>[[A1<|end_of_text|>\n]]"
    ),
    "phi4_mini": (
        f"<|user|>U1<|end|><|assistant|>[[functools[{_JSON}]<|end|>]]<|user|>42<|end|><|assistant|>[[A1<|end|>]]"
    ),
    "minimax1": (
        "<beginning_of_sentence>user name=user\nU1<end_of_sentence>\n<beginning_of_sentence>ai name=assistant\n"
        f"[[<tool_calls>\n{_JSON}\n</tool_calls><end_of_sentence>\n]]"
        "<beginning_of_sentence>tool name=tools\n42<end_of_sentence>\n<beginning_of_sentence>ai name=assistant\n"
        "[[A1<end_of_sentence>\n]]"
    ),
    "minimax2": (
        f"]~b]user\nU1[e~[\n]~b]ai\n[[{_EMPTY}\n<minimax:tool_call>\n"
        '<invoke name="f">\n<parameter name="x">1</parameter>\n</invoke>\n</minimax:tool_call>[e~[\n]]'
        f"]~b]tool\n<response>42</response>[e~[\n]~b]ai\n[[{_EMPTY}A1[e~[\n]]"
    ),
    "seed_oss": (
        "<s>user\nU1</s><s>assistant\n[[<seed:think></seed:think>\n<seed:tool_call>\n<function=f>\n"
        "<parameter=x>1</parameter>\n</function>\n</seed:tool_call></s>]]"
        "<s>user\n42</s><s>assistant\n[[<seed:think></seed:think>A1</s>]]"
    ),
    "bailing_v2": (
        f"<role>HUMAN</role>U1<|role_end|><role>ASSISTANT</role>[[{_TAGGED}<|role_end|>]]"
        "<role>OBSERVATION</role>\n<tool_response>\n42\n</tool_response><|role_end|><role>ASSISTANT</role>"
        "[[A1<|role_end|>]]"
    ),
    "bailing": (
        f"<role>HUMAN</role>U1<role>ASSISTANT</role>[[{_ACTION}]]<role>OBSERVATION</role>42<role>ASSISTANT</role>[[A1]]"
    ),
    "vicuna": f"USER: U1 ASSISTANT:[[{_ACTION}</s>]]USER: 42 ASSISTANT:[[A1</s>]]",
}


def test_every_dialect_is_in_some_template():
    from luthier.core.registry import names

    assert {find_template(name).tool_format for name in WRITTEN} == set(names("tool_formats"))


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_written_as_the_model_would_read_it(name, tok):
    renderer = make_renderer(TemplateConfig(template=name, default_system=""), tok)
    pairs = renderer.pairs(TALK)
    assert "".join(f"{tok.decode(source)}[[{tok.decode(said)}]]" for source, said in pairs) == WRITTEN[name]


@pytest.mark.parametrize("name", sorted(set(WRITTEN) - {"mistral", "ministral", "mistral_small"}))
def test_a_reply_is_read_back(name, tok):
    renderer = make_renderer(TemplateConfig(template=name, default_system=""), tok)
    [(_, said), _] = renderer.pairs(TALK)
    text = tok.decode([token for token in said if token not in renderer.stop_ids]).removesuffix("<|role_end|>")
    [call] = renderer.reply(text.removesuffix("\n")).calls
    assert (call.name, call.arguments) == ("f", {"x": 1})


@pytest.mark.parametrize("name", ["mistral", "ministral", "mistral_small"])
def test_a_reply_is_read_back_with_the_token_before_it(name, tok):
    renderer = make_renderer(TemplateConfig(template=name), tok)
    [(_, said), _] = renderer.pairs(TALK)
    [call] = renderer.reply(tok.decode(said[:-1])).calls
    assert (call.name, call.arguments) == ("f", {"x": 1})


def test_the_list_of_tools_of_moss_stands_alone_without_its_line_breaks(tok):
    tools = '[{"name": "f"}]'
    alone = tok.decode(make_renderer(TemplateConfig(template="moss_vl"), tok).prompt(TALK[:1], tools=tools))
    assert alone.startswith("<|im_start|>system\n# Tools\n\nYou may")
    beside = make_renderer(TemplateConfig(template="moss_vl"), tok).prompt(TALK[:1], system="S", tools=tools)
    assert tok.decode(beside).startswith("<|im_start|>system\nS\n\n# Tools\n\nYou may")
    plain = tok.decode(make_renderer(TemplateConfig(template="qwen3"), tok).prompt(TALK[:1], tools=tools))
    assert plain.startswith("<|im_start|>system\n\n\n# Tools\n\nYou may")


def test_the_day_is_that_of_the_configuration(tok):
    tools = '[{"name": "f"}]'
    first = tok.decode(make_renderer(TemplateConfig(template="llama3"), tok).prompt(TALK[:1], tools=tools))
    assert "Today Date: 26 Jul 2024\n" in first
    config = TemplateConfig(template="llama3", date_string="1 May 2030")
    assert "Today Date: 1 May 2030\n" in tok.decode(make_renderer(config, tok).prompt(TALK[:1], tools=tools))
