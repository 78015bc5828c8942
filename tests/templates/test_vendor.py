"""`template: auto` on the chat templates of the models' makers, and our dialects of tools against theirs."""

from __future__ import annotations

import json

import pytest

from luthier.core.errors import TemplateError
from luthier.core.types import Message
from luthier.data.renderer import make_renderer
from luthier.data.template import TemplateConfig
from luthier.data.tools import tool_format
from luthier.objectives.sft import Sft
from tests.templates.vendor import tokenizer_of

THOUGHT = "<think>\nhm hm\n</think>\n\n"
TALK = (
    Message("user", "What is 1 + 1?"),
    Message("assistant", "Two."),
    Message("user", "é 你好?"),
    Message("assistant", "Yes:\n\n  {x}."),
)
THINKING = (TALK[0], Message("assistant", THOUGHT + "Two."), *TALK[2:])
TOOLS = [
    {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "description": "First"}, "what": {"type": "string", "enum": ["x"]}},
            "required": ["a"],
        },
    }
]
CALLING = (
    TALK[0],
    Message("function", '{"name": "add", "arguments": {"a": 1, "what": "é"}}'),
    Message("observation", "42"),
    *TALK[1:],
)

WORK = sorted(
    "cohere cohere2 gemma3 gemma3_training gemma4 gemma4_v2 gemma4_v5 glm4moe glm4moe_training gptoss gptoss_training "
    "lfm2 lfm2_training lfm2_v2 lfm2_2_5 lfm2_2_5_v2 llama3 llama3_training llama3_1 llama3_2 phi3 phi3_training "
    "phi3_5 qwen2_5 qwen2_5_training qwen3 qwen3_training qwen3_5_think qwen3_5_nothink qwen3_5_think_training "
    "qwen3_6 qwen3_8 qwen3_instruct_2507 qwen3_instruct_2507_training qwen3_vl muse_glimmer".split()
)
THINK = [
    "gptoss",
    "gptoss_training",
    "lfm2_2_5",
    "qwen3",
    "qwen3_5_think",
    "qwen3_6",
    "qwen3_8",
    "glm4moe",
    "gemma4_v5",
]
CALL = [
    "gemma4", "gemma4_v5", "glm4moe", "lfm2_v2", "lfm2_2_5", "llama3_1", "llama3_2", "qwen2_5", "qwen3",
    "qwen3_5_think", "qwen3_6", "qwen3_8", "qwen3_instruct_2507",
]  # fmt: skip


def bind(name, **keys):
    return make_renderer(TemplateConfig(**keys), tokenizer_of(name))


def dicts(messages, system=""):
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return ([{"role": "system", "content": system}] if system else []) + turns


def check_that_each_turn_is_trained_as_it_is_generated(renderer, talk, **given):
    """Prompts of a chat are prompts of training, every response is there with an end that stops generation."""
    branches = renderer.branches(talk, **given)
    spoken = [place for place, message in enumerate(talk) if message.role in ("assistant", "function")]
    places = iter(spoken)
    for branch in branches:
        path = []
        for source, response in branch:
            place = next(places)
            path += source
            assert path == renderer.prompt(talk[:place], **given)
            path += response
            ids = [token for token in response if renderer.tokenizer.decode([token]).strip()]
            assert renderer.efficient_eos or ids[-1] in renderer.stop_ids
            assert talk[place].content.split("</think>")[-1].strip()[:4] in renderer.tokenizer.decode(response) or (
                talk[place].role == "function"
            )
    assert sum(map(len, branches)) == len(spoken)
    return branches


@pytest.mark.parametrize("thinking", [True, False, None])
@pytest.mark.parametrize("name", WORK)
def test_plain_talk(name, thinking):
    renderer = bind(name, enable_thinking=thinking)
    check_that_each_turn_is_trained_as_it_is_generated(renderer, TALK)
    check_that_each_turn_is_trained_as_it_is_generated(renderer, TALK, system="Be brief.")


@pytest.mark.parametrize("name", WORK)
def test_prompts_are_those_of_servers(name):
    renderer = bind(name, enable_thinking=None)
    for asked in (TALK[:1], TALK[:3]):
        served = tokenizer_of(name).apply_chat_template(
            dicts(asked, "Be brief."), add_generation_prompt=True, tokenize=False, date_string="26 Jul 2024"
        )
        text = renderer.tokenizer.decode(renderer.prompt(asked, system="Be brief."))
        if "Current date:" in text:  # theirs is today's
            text, served = (line.partition("Current date:")[0] for line in (text, served))
        assert text == served


@pytest.mark.parametrize("name", THINK)
def test_thoughts_are_trained_where_they_are_thought(name):
    renderer = bind(name)
    branches = check_that_each_turn_is_trained_as_it_is_generated(renderer, THINKING)
    responses = [renderer.tokenizer.decode(response) for branch in branches for _, response in branch]
    assert "hm hm" in responses[0]
    assert "hm hm" not in responses[1]
    last = "".join(renderer.tokenizer.decode(part) for pair in branches[-1] for part in pair)
    assert ("hm hm" in last) == (len(branches) == 1)


@pytest.mark.parametrize("name", CALL)
def test_calls_and_what_is_answered_to_them(name):
    renderer = bind(name, enable_thinking=False)
    given = {"tools": json.dumps(TOOLS), "system": "Be brief."}
    branches = check_that_each_turn_is_trained_as_it_is_generated(renderer, CALLING, **given)
    (_, call), (asked, _), *_ = [pair for branch in branches for pair in branch]
    assert "add" in renderer.tokenizer.decode(call)
    assert "42" in renderer.tokenizer.decode(asked)


@pytest.mark.parametrize("name", [name for name in CALL if not name.startswith("lfm2_2")])
def test_replies_are_read_as_the_template_writes_them(name):
    renderer = bind(name, enable_thinking=False)
    [(_, response), *_] = renderer.branches(CALLING, tools=json.dumps(TOOLS))[0]
    keep = [token for token in response if token not in renderer.stop_ids]
    [call] = renderer.reply(renderer.tokenizer.decode(keep).strip(), tools=json.dumps(TOOLS)).calls
    assert (call.name, call.arguments) == ("add", {"a": 1, "what": "é"})


@pytest.mark.parametrize("name", sorted(name for name in WORK if name.endswith("_training") and name[:3] != "gpt"))
def test_masks_are_those_of_hugging_face(name):
    renderer = bind(name, enable_thinking=None)
    theirs = tokenizer_of(name).apply_chat_template(dicts(TALK), return_dict=True, return_assistant_tokens_mask=True)
    *_, branch = renderer.branches(TALK)
    ids, at = [token for pair in branch for part in pair for token in part], 0
    assert ids == theirs["input_ids"][: len(ids)]
    for nth, (source, response) in enumerate(branch):
        given, said = theirs["assistant_masks"][at : at + len(source)], at + len(source)
        at = said + len(response)
        assert theirs["assistant_masks"][said:at] == [1] * len(response)
        # Where a block begins inside the generation prompt, nobody generates that part.
        assert nth == 0 or given == sorted(given)
        assert nth == 0 or sum(given[-6:]) == sum(given)
    assert sum(theirs["assistant_masks"][at:]) == 0


@pytest.mark.parametrize("name", ["deepseekv3", "deepseek_r1_distill", "nemotron_3_nano"])
def test_a_thought_that_only_the_prompt_opens_is_refused_with_the_place(name):
    with pytest.raises(TemplateError, match="at message 2 .* The first difference, at character"):
        bind(name).branches(TALK)


def test_the_error_says_what_may_help():
    with pytest.raises(TemplateError, match="or enable_thinking: false if"):
        bind("nemotron_3_nano").branches(TALK)
    assert bind("nemotron_3_nano", enable_thinking=False).branches(TALK)


def test_an_earlier_turn_that_cannot_be_trained_on_is_no_matter_for_the_last():
    renderer = bind("nemotron_3_nano")
    talk = (*TALK[:3], Message("assistant", THOUGHT + "Yes."))
    with pytest.raises(TemplateError, match="at message 2"):
        renderer.branches(talk)
    source, response = renderer.oneturn(talk)
    assert renderer.pairs(talk, mask_history=True) == [(source, response)]
    assert renderer.prompt(talk[:3]) == source
    assert renderer.tokenizer.decode(source).endswith("<|im_start|>assistant\n<think>\n")
    assert renderer.tokenizer.decode(response).split() == ["hm", "hm", "</think>", "Yes.<|im_end|>"]
    with pytest.raises(TemplateError, match="at message 4"):
        renderer.oneturn(TALK)


def test_a_conversation_becomes_one_example_with_a_path_for_each_branch():
    from luthier.core.types import Answer, Example

    renderer = bind("qwen3")
    [encoded] = Sft().encode(Example(THINKING[:3], (Answer(THINKING[3:]),)), renderer, cutoff_len=500)
    assert [path.name for path in encoded.paths] == ["response", "response-2"]
    said = [
        renderer.tokenizer.decode([token for token, weight in zip(path.ids, path.weights) if weight])
        for path in encoded.paths
    ]
    assert said == [THOUGHT + "Two.<|im_end|>\n", "<think>\n\n</think>\n\nYes:\n\n  {x}.<|im_end|>\n"]


class TestDialects:
    """What we write of tools is what the makers' templates write."""

    @pytest.mark.parametrize(
        ("dialect", "name"),
        [
            ("qwen", "qwen2_5"),
            ("qwen", "qwen3"),
            ("qwen3_5", "qwen3_5_think"),
            ("glm4_moe", "glm4moe"),
            ("gemma4", "gemma4_v5"),
            ("llama3", "llama3_1"),
        ],
    )
    def test_calls(self, dialect, name):
        whole = self.written(name, "user", "assistant")
        assert tool_format(dialect).call([self.call()]) in whole

    @pytest.mark.parametrize(
        ("dialect", "name"), [("qwen", "qwen2_5"), ("gemma4", "gemma4_v5"), ("llama3", "llama3_1")]
    )
    def test_definitions(self, dialect, name):
        described = tool_format(dialect).describe(TOOLS, "26 Jul 2024")
        if dialect == "llama3":  # theirs stands in the user's turn unless told otherwise
            described = described.rpartition("Do not use variables.\n\n")[2]
        assert described in self.written(name, "user")

    def written(self, name, *roles):
        from luthier.data.chat_text import ChatText

        text = ChatText(TemplateConfig(enable_thinking=False), tokenizer_of(name))
        return text.asked(CALLING[: 2 * len(roles) - 1], "Be brief.", json.dumps(TOOLS))

    def call(self):
        from luthier.core.types import Call

        return Call("add", {"a": 1, "what": "é"})
