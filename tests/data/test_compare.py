"""Where a named template and the tokenizer's own part ways."""

from __future__ import annotations

import copy

import pytest

from luthier.data.compare import compare
from luthier.data.template import TemplateConfig
from tests.conftest import build_tokenizer
from tests.templates import official
from tests.templates.vendor import tokenizer_of


@pytest.fixture(scope="module")
def _base():
    return build_tokenizer(extra_specials=("<think>", "</think>", "<|user|>", "<|assistant|>"))


@pytest.fixture
def tok(_base):
    tokenizer = copy.deepcopy(_base)
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def found(tokenizer, source, name, **keys):
    tokenizer.chat_template = source
    before = (tokenizer.eos_token, tokenizer.chat_template, len(tokenizer))
    lines = compare(TemplateConfig(template=name, **keys), tokenizer)
    assert (tokenizer.eos_token, tokenizer.chat_template, len(tokenizer)) == before
    return lines


def test_nothing_to_compare(tok):
    assert found(tok, official.QWEN25, None) == []
    assert found(tok, official.QWEN25, "auto") == []
    assert found(tok, None, "qwen") == []


def test_the_same(tok):
    [line] = found(tok, official.QWEN25, "qwen")
    assert line == (
        "template 'qwen' writes what the tokenizer's own chat template writes (a conversation, a system prompt, a call "
        "of a tool)"
    )


def test_a_default_system_prompt_with_a_full_stop_more(tok):
    first, calls, advice = found(tok, official.SMOLLM2, "smollm2")
    assert first.startswith(
        "a conversation: template 'smollm2' and the tokenizer's own chat template differ from token"
    )
    assert "Hugging Face': '.<|im_end|>\\n<|im_start|>user\\nWhat" in first
    assert "against '<|im_end|>\\n<|im_start|>user\\nWhat" in first
    assert "a call of a tool: only template 'smollm2' can write it (the tokenizer's chat template leaves" in calls
    assert "template: auto" in advice


def test_thoughts(tok):
    lines = found(tok, official.QWEN3, "qwen3", enable_thinking=False)
    assert not any(line.startswith(("a conversation", "a system prompt")) for line in lines)
    [named, *_] = found(tok, official.QWEN3, "qwen3_nothink")
    assert named.startswith("a conversation: template 'qwen3_nothink' and")
    assert "after '" in named
    assert "assistant\\n': 'It is 4." in named
    assert "against '<think>\\n\\n</think>\\n\\nIt is" in named


def test_what_is_trained_counts_too(tok):
    tracked = official.TRACKED.replace("+ '<|im_end|>' }}{% endg", "}}{% endg").replace(
        "{{ '\n' }}", "{{ '<|im_end|>\n' }}"
    )
    lines = found(tok, tracked, "chatml")
    assert (
        "the same tokens, but template 'chatml' trains 'It is 4.<|im_end|>\\n', the tokenizer's own 'It is 4.'"
        in lines[0]
    )


def test_no_advice_to_use_what_cannot_do_it(tok):
    [line] = found(tok, official.CHATML, "chatml")
    assert line.startswith("a call of a tool: only template 'chatml' can write it")


def test_a_chat_template_that_cannot_be_trained_on(tok):
    [line] = found(tok, "{% for m in messages %}{{ m.content + '###' }}{% endfor %}", "chatml")
    assert "cannot be compared" in line
    assert "learn to stop" in line


@pytest.mark.parametrize(
    ("name", "vendor", "differ"),
    [
        ("qwen", "qwen2_5", []),
        ("qwen3", "qwen3", []),
        ("llama3", "llama3", ["a call of a tool"]),
        ("phi", "phi3", ["a conversation", "a system prompt", "a call of a tool"]),
        ("gemma", "gemma3", ["a call of a tool"]),
        ("gemma3", "gemma3", ["a call of a tool"]),
        ("glm4_moe", "glm4moe", ["a conversation", "a system prompt", "a call of a tool", "a thought"]),
    ],
)
def test_named_templates_against_their_makers(name, vendor, differ):
    lines = compare(TemplateConfig(template=name), tokenizer_of(vendor))
    assert [line.partition(":")[0] for line in lines if ":" in line and not line.startswith("Servers")] == differ
