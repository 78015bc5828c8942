"""The tokenizer's own chat template: exact labels, or a refusal that says why."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.core.errors import ConfigError, TemplateError
from luthier.core.types import Answer, Example, Message
from luthier.data.template import TemplateConfig, make_renderer
from tests.conftest import build_tokenizer
from tests.templates import official

TALK = (Message("user", "U1"), Message("assistant", "A1"), Message("user", "U2"), Message("assistant", "A2"))
EXTRA = ("<think>", "</think>", "<|end|>", "<|user|>", "<|assistant|>", "<｜User｜>", "<｜Assistant｜>")


@pytest.fixture(scope="module")
def _base():
    return build_tokenizer(extra_specials=EXTRA)


@pytest.fixture
def tok(_base):
    """Fresh, with eos </s> and ChatML."""
    tokenizer = copy.deepcopy(_base)
    tokenizer.eos_token = "</s>"
    return tokenizer


def bind(tokenizer, template=None, **keys):
    if template is not None:
        tokenizer.chat_template = template
    return make_renderer(TemplateConfig(**keys), tokenizer)


def shown(tokenizer, pairs):
    return [(tokenizer.decode(source), tokenizer.decode(response)) for source, response in pairs]


def test_responses_with_their_end_are_what_is_trained(tok):
    assert shown(tok, bind(tok).pairs(TALK)) == [
        ("<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\n", "A1<|im_end|>\n"),
        ("<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n", "A2<|im_end|>\n"),
    ]


def test_the_end_of_turn_stops_generation_beside_eos(tok):
    assert bind(tok).stop_ids == tuple(tok.convert_tokens_to_ids(["</s>", "<|im_end|>"]))
    assert tok.eos_token == "</s>"


def test_eos_and_pad_are_given_if_missing(tok):
    tok.eos_token = tok.pad_token = None
    bind(tok)
    assert (tok.eos_token, tok.pad_token) == ("<|im_end|>", "<|im_end|>")


def test_a_default_system_prompt_of_the_template_is_in_training_and_in_prompts(tok):
    renderer = bind(tok, official.SMOLLM2)
    [(source, _), _] = renderer.pairs(TALK)
    assert tok.decode(source).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert renderer.prompt(TALK[:1]) == source
    assert "SmolLM" not in tok.decode(renderer.prompt(TALK[:1], system="S"))


def test_default_system_of_the_configuration(tok):
    text = tok.decode(bind(tok, default_system="mine").prompt(TALK[:1]))
    assert text.startswith("<|im_start|>system\nmine<|im_end|>\n")


def test_bos_once_although_the_tokenizer_adds_one_too(tok):
    from tokenizers.processors import TemplateProcessing

    tok.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    renderer = bind(tok, official.INTERN2)
    ids = [token for pair in renderer.pairs(TALK) for part in pair for token in part]
    assert ids.count(1) == 1
    assert ids[0] == 1
    assert renderer.prompt(TALK[:3]).count(1) == 1
    assert tok.decode(renderer.document("dog")) == "<s>dog</s>"


def test_an_eos_that_closes_only_the_conversation_belongs_to_the_last_response(tok):
    renderer = bind(tok, official.PHI3)
    assert shown(tok, renderer.pairs(TALK)) == [
        ("<|user|>\nU1<|end|>\n<|assistant|>\n", "A1<|end|>\n"),
        ("<|user|>\nU2<|end|>\n<|assistant|>\n", "A2<|end|>\n</s>"),
    ]


class TestUnstable:
    def test_thoughts_stripped_from_history(self, tok):
        renderer = bind(tok, official.QWEN3)
        with pytest.raises(TemplateError, match="earlier turn is rewritten") as error:
            renderer.pairs(TALK)
        assert "<think>" in str(error.value)
        assert "mask_history" in str(error.value)

    def test_only_the_last_response_is_no_matter(self, tok):
        renderer = bind(tok, official.QWEN3)
        expected = (
            "<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
            "<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n",
            "<think>\n\n</think>\n\nA2<|im_end|>\n",
        )
        assert shown(tok, renderer.pairs(TALK, mask_history=True)) == [expected]
        assert shown(tok, [renderer.oneturn(TALK)]) == [expected]
        assert tok.decode(renderer.prompt(TALK[:3])) == expected[0]

    def test_system_prompt_that_wanders(self, tok):
        renderer = bind(tok, official.MISTRAL_LAST)
        with pytest.raises(TemplateError, match="first difference"):
            renderer.pairs(TALK, system="S")
        assert tok.decode(renderer.oneturn(TALK, system="S")[0]) == "<s>[INST] U1[/INST] A1</s>[INST] S\n\nU2[/INST]"

    def test_a_generation_prompt_that_training_never_sees(self, tok):
        renderer = bind(tok, official.DEEPSEEK_R1)
        with pytest.raises(TemplateError, match="character") as error:
            renderer.pairs(TALK[:2])
        assert "think" in str(error.value)
        with pytest.raises(TemplateError):
            renderer.oneturn(TALK[:2])


class TestGenerationBlocks:
    def test_same_tokens_as_hugging_face_marks(self, tok):
        renderer = bind(tok, official.TRACKED)
        ids, trained = [], []
        for source, response in renderer.pairs(TALK, system="S"):
            ids += source + response
            trained += [0] * len(source) + [1] * len(response)
        dicts = [{"role": "system", "content": "S"}, *({"role": m.role, "content": m.content} for m in TALK)]
        theirs = tok.apply_chat_template(dicts, return_dict=True, return_assistant_tokens_mask=True)
        assert sum(trained) == sum(theirs["assistant_masks"]) > 0
        assert trained == theirs["assistant_masks"][: len(ids)]
        assert ids == theirs["input_ids"][: len(ids)]

    def test_prompts_agree_with_training(self, tok):
        renderer = bind(tok, official.TRACKED)
        pairs = renderer.pairs(TALK)
        assert renderer.prompt(TALK[:3]) == pairs[0][0] + pairs[0][1] + pairs[1][0]

    def test_a_block_in_the_wrong_place_is_refused(self, tok):
        swapped = official.TRACKED.replace("m.role == 'assistant'", "m.role == 'user'")
        with pytest.raises(TemplateError, match="generation"):
            bind(tok, swapped).pairs(TALK)


def test_prompts_after_a_turn_without_the_closing_eos(tok):
    renderer = bind(tok, official.PHI3)
    pairs = renderer.pairs(TALK)
    assert renderer.prompt(TALK[:3]) == pairs[0][0] + pairs[0][1] + pairs[1][0]


class TestDocumentsOnly:
    @pytest.mark.parametrize(
        ("template", "problem"),
        [(None, "template: chatml"), (official.GLM4, "learn to stop"), ("{% for m in messages %}", "cannot render")],
    )
    def test_conversations_are_refused_with_the_reason(self, tok, template, problem):
        tok.chat_template = template
        renderer = bind(tok)
        example = Example(TALK[:3], (Answer(TALK[3:]),))
        for call in (
            lambda: renderer.pairs(TALK),
            lambda: renderer.oneturn(TALK),
            lambda: renderer.prompt(TALK[:1]),
            lambda: renderer.texts(example),
        ):
            with pytest.raises(ConfigError, match=problem):
                call()

    def test_documents_are_rendered(self, tok):
        tok.chat_template = tok.pad_token = None
        renderer = pickle.loads(pickle.dumps(bind(tok)))
        renderer.warm(["dog"])
        assert tok.decode(renderer.document("dog")) == "dog</s>"
        assert renderer.stop_ids == (tok.eos_token_id,)
        assert tok.pad_token == "</s>"

    def test_without_eos_not_even_those(self, tok):
        tok.chat_template = tok.eos_token = None
        with pytest.raises(ConfigError, match="eos_token"):
            bind(tok)


class TestRefused:
    def test_the_template_s_own_complaint_is_told(self, tok):
        renderer = bind(
            tok,
            official.CHATML.replace(
                "{% for", "{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}{% for", 1
            ),
        )
        with pytest.raises(TemplateError, match="too long"):
            renderer.pairs(TALK)

    @pytest.mark.parametrize("key", [{"tool_format": "qwen"}, {"efficient_eos": True}, {"replace_eos": False}])
    def test_keys_that_only_named_templates_have(self, tok, key):
        with pytest.raises(ConfigError, match=next(iter(key))):
            bind(tok, **key)

    def test_wrong_order(self, tok):
        with pytest.raises(TemplateError, match="expected user"):
            bind(tok).pairs(TALK[1:3])

    def test_tool_calls_that_the_template_drops(self, tok):
        call = Message("function", '{"name": "add", "arguments": {}}')
        with pytest.raises(TemplateError, match="leaves out calls of tools .add"):
            bind(tok).pairs((TALK[0], call))

    def test_tool_answers_that_the_template_drops(self, tok):
        deaf = official.QWEN25.replace("m.content + '\\n</tool_response>", "'\\n</tool_response>")
        talk = (TALK[0], Message("function", '{"name": "add", "arguments": {}}'), Message("observation", "42"), TALK[1])
        with pytest.raises(TemplateError, match="tools answer"):
            bind(tok, deaf).pairs(talk)


class TestVariables:
    def test_thinking(self, tok):
        assert tok.decode(bind(tok, official.QWEN3).prompt(TALK[:1])).endswith("assistant\n")
        off = bind(tok, official.QWEN3, enable_thinking=False)
        assert tok.decode(off.prompt(TALK[:1])).endswith("<think>\n\n</think>\n\n")
        assert tok.decode(off.pairs(TALK[:2])[0][1]) == "A1<|im_end|>\n"

    def test_thinking_left_to_the_template(self, tok):
        asks = official.CHATML + "{% if enable_thinking is defined %}{{ 'told' }}{% endif %}"
        assert tok.decode(bind(tok, asks, enable_thinking=None).prompt(TALK[:1])).endswith("assistant\n")
        assert tok.decode(bind(tok, asks, enable_thinking=True).prompt(TALK[:1])).endswith("told")

    def test_the_date_is_the_one_given(self, tok):
        dated = "{{ '<|im_start|>' + date_string }}" + official.CHATML
        assert tok.decode(bind(tok, dated).prompt(TALK[:1])).startswith("<|im_start|>26 Jul 2024")
        assert tok.decode(bind(tok, dated, date_string="1 May").prompt(TALK[:1])).startswith("<|im_start|>1 May")

    @pytest.mark.parametrize("keys", [{"enable_thinking": False}, {"preserve_thinking": True}])
    def test_a_key_without_effect_warns(self, tok, caplog, keys):
        bind(tok, **keys)
        assert "no effect" in caplog.text

    def test_todays_date_warns(self, tok, caplog):
        bind(tok, "{{ strftime_now('%d') }}" + official.CHATML)
        assert "date" in caplog.text

    @pytest.mark.parametrize(
        "keys", [{"default_system": "x"}, {"enable_thinking": False}, {"preserve_thinking": True}, {"date_string": "x"}]
    )
    def test_fingerprint(self, tok, keys):
        plain = bind(tok).fingerprint()
        assert bind(tok, **keys).fingerprint() != plain
        assert bind(tok, official.SMOLLM2).fingerprint() != plain


def test_pickled_and_warmed_it_gives_the_same_ids(tok, monkeypatch):
    renderer = bind(tok)
    expected = renderer.pairs(TALK, system="S")
    other = pickle.loads(pickle.dumps(renderer))
    assert other.pairs(TALK, system="S") == expected
    renderer.warm(renderer.texts(Example(TALK[:3], (Answer(TALK[3:]),), system="S")))
    monkeypatch.setattr(type(tok), "__call__", lambda *_, **__: pytest.fail("tokenised one by one"))
    monkeypatch.setattr(type(renderer), "_apply", lambda *_, **__: pytest.fail("rendered twice"))
    assert renderer.pairs(TALK, system="S") == expected


def test_what_was_warm_is_no_answer_to_another_question(tok):
    renderer = bind(tok, official.QWEN3)
    other = (Message("user", "U3"), *TALK[1:])
    with pytest.raises(TemplateError):
        renderer.texts(Example(TALK[:3], (Answer(TALK[3:]),)))
    renderer.warm(renderer.texts(Example(TALK[:1], (Answer(TALK[1:2]),))))
    with pytest.raises(TemplateError):
        renderer.pairs(TALK)
    assert tok.decode(renderer.pairs(other[:2], system="S")[0][0]).count("U3") == 1
    assert renderer.pairs(TALK[:2]) == bind(copy.deepcopy(tok)).pairs(TALK[:2])


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(
        st.text(
            st.one_of(st.sampled_from(" \n\t{}<>|é你\u00a0"), st.characters(exclude_categories=["Cs"])), max_size=30
        ),
        min_size=4,
        max_size=4,
    )
)
def test_supervised_text_is_the_response_to_the_letter(tok, texts):
    talk = [Message(role, text) for role, text in zip(("user", "assistant") * 2, texts)]
    pairs = bind(tok).pairs(talk)
    assert [tok.decode(response) for _, response in pairs] == [f"{texts[1]}<|im_end|>\n", f"{texts[3]}<|im_end|>\n"]
    assert texts[0] in tok.decode(pairs[0][0])
    assert texts[2] in tok.decode(pairs[1][0])
