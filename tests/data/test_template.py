"""Binding a template: what it does to the tokenizer, what the keys change, what it refuses."""

from __future__ import annotations

import pytest

from luthier.core.errors import ConfigError, TemplateError
from luthier.core.registry import _plugins, use_plugins
from luthier.core.types import Message
from luthier.data.renderer import make_renderer
from luthier.data.template import BOS, EOS, Template, TemplateConfig, find_template
from tests.conftest import build_tokenizer

TALK = (Message("user", "U1"), Message("assistant", "A1"), Message("user", "U2"), Message("assistant", "A2"))


@pytest.fixture
def tok():
    """Fresh: bos <s>, eos </s>, pad <pad>, and the tokens of ChatML."""
    tokenizer = build_tokenizer()
    tokenizer.eos_token = "</s>"
    return tokenizer


def bind(tokenizer, name, **keys):
    return make_renderer(TemplateConfig(template=name, **keys), tokenizer)


def text(tokenizer, pairs):
    return "".join(f"{tokenizer.decode(source)}[[{tokenizer.decode(response)}]]" for source, response in pairs)


def test_each_slot_string_is_tokenised_on_its_own(tok):
    renderer = bind(tok, "default")
    [(source, response)] = renderer.pairs((Message("user", "the"), Message("assistant", "dog")))
    plain = lambda piece: tok.encode(piece, add_special_tokens=False)  # noqa: E731
    assert source == [*plain("Human: the"), tok.eos_token_id, *plain("\nAssistant:")]
    assert response == [*plain("dog"), tok.eos_token_id, *plain("\n")]


def test_replace_eos_makes_the_stop_word_eos(tok):
    renderer = bind(tok, "qwen")
    assert tok.eos_token == "<|im_end|>"
    assert renderer.stop_ids == (tok.convert_tokens_to_ids("<|im_end|>"),)


def test_a_stop_word_that_is_not_eos_stops_too_and_is_special(tok):
    renderer = bind(tok, "smollm2")
    assert tok.eos_token == "</s>"
    assert renderer.stop_ids == tuple(tok.convert_tokens_to_ids(["</s>", "<|im_end|>"]))
    assert tok.decode(renderer.pairs(TALK)[0][1], skip_special_tokens=True) == "A1\n"


def test_pad_becomes_eos_if_there_is_none(tok):
    tok.pad_token = None
    bind(tok, "chatml")
    assert tok.pad_token == tok.eos_token == "<|im_end|>"


def test_vocabulary_never_grows(tok):
    before = len(tok)
    bind(tok, "chatml")
    assert len(tok) == before


def test_binding_twice_changes_nothing(tok):
    first, second = bind(tok, "qwen"), bind(tok, "qwen")
    assert first.pairs(TALK) == second.pairs(TALK)
    assert first.fingerprint() == second.fingerprint()


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("llama3", "<|start_header_id|>, <|end_header_id|>, <|eot_id|>"),
        ("chatglm3", "[gMASK], sop"),
        ("phi4", "<|im_sep|>"),
    ],
)
def test_a_missing_token_is_named_with_the_way_to_add_it(tok, name, missing):
    with pytest.raises(TemplateError, match="add_special_tokens") as error:
        bind(tok, name)
    for token in missing.split(", "):
        assert token in str(error.value)


def test_a_stop_word_the_template_never_writes_may_be_missing():
    tokenizer = build_tokenizer(
        extra_specials=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
    )
    renderer = bind(tokenizer, "llama3")
    assert renderer.stop_ids == (tokenizer.convert_tokens_to_ids("<|eot_id|>"),)
    assert tokenizer.convert_ids_to_tokens(renderer.document("dog")[-1]) == "<|end_of_text|>"


def test_no_eos_at_all_is_refused(tok):
    tok.eos_token = None
    with pytest.raises(TemplateError, match="eos_token"):
        bind(tok, "vicuna")


def test_unknown_template_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'qwen3'"):
        find_template("qwen_3")


def test_a_plugin_brings_a_template(tmp_path, tok):
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "mine_family.py").write_text(
        "from luthier.data.template import EOS, Template\n"
        "TEMPLATES = {'mine': Template(user='Q: {{content}} #{{idx}}\\nA:', assistant=(' {{content}}', EOS))}\n"
    )
    use_plugins(tmp_path)
    try:
        pairs = bind(tok, "mine").pairs(TALK)
    finally:
        _plugins.clear()
    assert text(tok, pairs) == "Q: U1 #0\nA:[[ A1</s>]]Q: U2 #1\nA:[[ A2</s>]]"


def test_a_template_defined_twice_is_refused(tmp_path):
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "other.py").write_text(
        "from luthier.data.template import Template\nTEMPLATES = {'qwen': Template()}\n"
    )
    use_plugins(tmp_path)
    try:
        with pytest.raises(ConfigError, match="qwen"):
            find_template("qwen")
    finally:
        _plugins.clear()


class TestKeys:
    def test_default_system(self, tok):
        got = text(tok, bind(tok, "chatml", default_system="mine").pairs(TALK))
        assert got.startswith("<|im_start|>system\nmine<|im_end|>\n<|im_start|>user\nU1")
        given = text(tok, bind(tok, "chatml", default_system="mine").pairs(TALK, system="yours"))
        assert given.startswith("<|im_start|>system\nyours<|im_end|>\n")
        none = text(tok, bind(tok, "qwen", default_system="").pairs(TALK))
        assert none.startswith("<|im_start|>user\nU1")

    def test_tool_format_keeps_the_end_of_turn(self, tok):
        call = (TALK[0], Message("function", '{"name": "f", "arguments": {"x": 1}}'))
        [(_, response)] = bind(tok, "chatml", tool_format="qwen").pairs(call)
        assert tok.decode(response) == '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>\n'

    def test_unknown_tool_format(self, tok):
        with pytest.raises(ConfigError, match="Did you mean 'qwen'"):
            bind(tok, "chatml", tool_format="qwn")

    def test_efficient_eos_takes_eos_from_the_turns(self, tok):
        renderer = bind(tok, "vicuna", efficient_eos=True)
        assert renderer.efficient_eos
        assert [tok.decode(response) for _, response in renderer.pairs(TALK)] == ["A1", "A2"]

    def test_efficient_eos_off_puts_eos_into_the_turns(self, tok):
        renderer = bind(tok, "solar", efficient_eos=False)
        assert not renderer.efficient_eos
        assert [tok.decode(response) for _, response in renderer.pairs(TALK)] == ["A1</s>", "A2</s>"]

    def test_efficient_eos_of_a_template_with_its_own_end_is_refused(self, tok):
        with pytest.raises(ConfigError, match="efficient_eos"):
            bind(tok, "qwen", efficient_eos=True)

    def test_replace_eos_off_and_on(self, tok):
        bind(tok, "qwen", replace_eos=False)
        assert tok.eos_token == "</s>"
        bind(tok, "smollm2", replace_eos=True)
        assert tok.eos_token == "<|im_end|>"
        with pytest.raises(ConfigError, match="replace_eos"):
            bind(tok, "vicuna", replace_eos=True)

    def test_thinking_keys_without_thoughts_warn(self, tok, caplog):
        bind(tok, "chatml", enable_thinking=False)
        assert "no effect" in caplog.text

    @pytest.mark.parametrize(
        "keys",
        [
            {"default_system": "x"},
            {"tool_format": "qwen"},
            {"enable_thinking": False},
            {"preserve_thinking": True},
            {"date_string": "1 Jan 2030"},
        ],
    )
    def test_what_may_change_ids_changes_the_fingerprint(self, tok, keys):
        name = "qwen3" if "thinking" in next(iter(keys)) else "chatml"
        assert bind(tok, name, **keys).fingerprint() != bind(tok, name).fingerprint()


class TestDocument:
    def test_eos_ends_a_document_once(self, tok):
        ids = bind(tok, "default").document("dog <b>")
        assert tok.decode(ids) == "dog <b></s>"

    def test_bos_where_the_tokenizer_adds_one(self, tok):
        from tokenizers.processors import TemplateProcessing

        tok.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        assert tok.decode(bind(tok, "default").document("dog")) == "<s>dog</s>"
        assert bind(tok, "chatml").pairs(TALK)[0][0].count(1) == 0


class TestOrder:
    @pytest.mark.parametrize(
        "roles",
        [
            "",
            "user",
            "assistant user",
            "user user",
            "user assistant assistant user",
            "system user assistant",
            "user function user",
        ],
    )
    def test_refused_for_pairs(self, tok, roles):
        messages = [Message(role, "x") for role in roles.split()]
        with pytest.raises(TemplateError, match="chatml"):
            bind(tok, "chatml").pairs(messages)

    def test_refused_for_a_prompt(self, tok):
        with pytest.raises(TemplateError, match="end with a user"):
            bind(tok, "chatml").prompt(TALK[:2])

    def test_tools_go_round(self, tok):
        call = '{"name": "f", "arguments": {}}'
        talk = (TALK[0], Message("function", call), Message("observation", "42"), TALK[1])
        got = text(tok, bind(tok, "chatml").pairs(talk))
        assert got == (
            "<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\n[[Action: f\nAction Input: {}<|im_end|>\n]]"
            "<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n[[A1<|im_end|>\n]]"
        )

    def test_a_fused_system_prompt_is_never_lost(self, tok):
        talk = (Message("observation", "42"), TALK[1])
        with pytest.raises(TemplateError, match="system prompt"):
            bind(tok, "llama2").pairs(talk, system="S")


def test_slots_left_unset_follow_others():
    assert Template().slots("assistant") == ("{{content}}", EOS)
    assert Template(efficient_eos=True).slots("assistant") == ("{{content}}",)
    assert Template(user=(BOS, "x{{content}}")).slots("observation") == (BOS, "x{{content}}")
    assert Template(assistant="{{content}}!").slots("function") == ("{{content}}!",)


@pytest.mark.parametrize("keys", [{"enable_thinking": False}, {"preserve_thinking": True}, {"branch_thinking": True}])
def test_keys_about_thoughts_are_said_to_be_idle_where_there_are_none(caplog, keys):
    with caplog.at_level("WARNING", logger="luthier"):
        make_renderer(TemplateConfig(template="default", **keys), build_tokenizer())
    assert "template 'default' has no thoughts" in caplog.text and next(iter(keys)) in caplog.text
