"""The tokenizer's own chat template: exact labels, or a refusal that says why."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.core.errors import ConfigError, TemplateError
from luthier.core.types import Answer, Call, Example, Message, Reply
from luthier.data.chat_text import ChatText
from luthier.data.renderer import make_renderer
from luthier.data.template import TemplateConfig
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


ASK = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"


class TestUnstable:
    """Templates that show the past otherwise than it was."""

    def test_thoughts_vanish_from_history_so_each_turn_is_a_branch(self, tok):
        renderer = bind(tok, official.QWEN3)
        first, second = renderer.branches(TALK)
        assert shown(tok, first) == [(ASK.format("U1"), EMPTY + "A1<|im_end|>\n")]
        assert shown(tok, second) == [
            (ASK.format("U1") + "A1<|im_end|>\n" + ASK.format("U2"), EMPTY + "A2<|im_end|>\n")
        ]

    def test_steps_between_two_questions_share_a_branch(self, tok):
        call = Message("function", '<think>\nhm\n</think>\n\n{"name": "f", "arguments": {}}')
        talk = (TALK[0], call, Message("observation", "42"), TALK[1], *TALK[2:])
        template = official.QWEN3.replace(
            "{{- content.lstrip",
            "{%- for c in m.tool_calls or [] %}{{- c.function.name }}{%- endfor %}{{- content.lstrip",
        )
        branches = bind(tok, template).branches(talk)
        assert [len(branch) for branch in branches] == [2, 1]
        assert shown(tok, branches[0])[0][1] == "<think>\nhm\n</think>\n\nf<|im_end|>\n"
        assert shown(tok, branches[0])[1][1] == EMPTY + "A1<|im_end|>\n"

    def test_every_prompt_is_the_one_that_a_chat_gives(self, tok):
        renderer = bind(tok, official.QWEN3)
        for turn, branch in enumerate(renderer.branches(TALK, system="S")):
            assert branch[0][0] == renderer.prompt(TALK[: 2 * turn + 1], system="S")

    def test_one_sequence_is_refused_with_the_first_difference(self, tok):
        with pytest.raises(TemplateError, match="once message 3 is there, an earlier turn is rewritten") as error:
            bind(tok, official.QWEN3).pairs(TALK)
        assert "'<think>\\n\\n</think>" in str(error.value)
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
        assert [shown(tok, branch) for branch in renderer.branches(TALK, system="S")] == [
            [("<s>[INST] S\n\nU1[/INST]", " A1</s>")],
            [("<s>[INST] U1[/INST] A1</s>[INST] S\n\nU2[/INST]", " A2</s>")],
        ]

    def test_a_stable_template_has_one_branch(self, tok):
        renderer = bind(tok)
        assert renderer.branches(TALK, system="S") == [renderer.pairs(TALK, system="S")]

    def test_a_generation_prompt_that_training_never_sees(self, tok):
        renderer = bind(tok, official.DEEPSEEK_R1)
        with pytest.raises(TemplateError, match="character") as error:
            renderer.pairs(TALK[:2])
        assert "think" in str(error.value)
        for ask in (renderer.oneturn, renderer.branches):
            with pytest.raises(TemplateError, match="message 2"):
                ask(TALK[:2])

    def test_warmed_branches_are_the_same(self, tok, monkeypatch):
        renderer = bind(tok, official.QWEN3)
        expected = renderer.branches(TALK)
        renderer.warm(renderer.texts(Example(TALK[:3], (Answer(TALK[3:]),))))
        monkeypatch.setattr(type(tok), "__call__", lambda *_, **__: pytest.fail("tokenised one by one"))
        monkeypatch.setattr(ChatText, "_apply", lambda *_, **__: pytest.fail("rendered twice"))
        assert renderer.branches(TALK) == expected


class TestNoEnd:
    """GLM: a turn ends where the next one begins, so the stage puts an end there."""

    def test_the_stage_ends_the_turns(self, tok):
        renderer = bind(tok, official.GLM4)
        assert renderer.efficient_eos
        assert shown(tok, renderer.pairs(TALK)) == [
            ("[gMASK]<sop><|user|>\nU1<|assistant|>", "\nA1"),
            ("<|user|>\nU2<|assistant|>", "\nA2"),
        ]
        assert renderer.stop_ids == (tok.eos_token_id,)

    def test_without_eos_it_is_no_template_to_train_with(self, tok):
        tok.eos_token = None
        tok.chat_template = official.GLM4
        with pytest.raises(ConfigError, match="learn to stop"):
            bind(tok)


class TestOrders:
    """Any order that the template renders."""

    @pytest.mark.parametrize(
        ("roles", "expected"),
        [
            ("uua", ["<|im_start|>user\n0<|im_end|>\n" + ASK.format("1") + "[2]"]),
            ("aua", ["<|im_start|>assistant\n[0]", ASK.format("1") + "[2]"]),
            ("uaa", [ASK.format("0") + "[1]", "<|im_start|>assistant\n[2]"]),
            ("uasua", [ASK.format("0") + "[1]", "<|im_start|>system\n2<|im_end|>\n" + ASK.format("3") + "[4]"]),
        ],
    )
    def test_pairs_by_the_model_s_turns(self, tok, roles, expected):
        names = {"u": "user", "a": "assistant", "s": "system"}
        talk = [Message(names[role], str(nth)) for nth, role in enumerate(roles)]
        got = [f"{source}[{said}]" for source, said in shown(tok, bind(tok).pairs(talk))]
        assert got == [text.replace("]", "<|im_end|>\n]") for text in expected]

    def test_results_of_tools_go_to_their_calls_in_order(self, tok):
        calls = "(m.tool_calls|tojson if m.tool_calls else '')"
        named = official.CHATML.replace(
            "m.content +", f"(m.content or '') + (m.tool_call_id or '') + (m.name or '') + {calls} +"
        )
        calls = Message("function", '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]')
        talk = (TALK[0], calls, Message("observation", "1"), Message("observation", "2"), TALK[1])
        text = "".join(part for pair in shown(tok, bind(tok, named).pairs(talk)) for part in pair)
        assert "1call00000f<|im_end|>" in text
        assert "2call00001g<|im_end|>" in text


def test_auto_is_what_unset_is(tok):
    assert bind(tok, template=None).pairs(TALK) == make_renderer(TemplateConfig(template="auto"), tok).pairs(TALK)


def test_replies_are_read_in_the_dialect_of_the_template(tok):
    renderer = bind(tok, official.QWEN25)
    reply = renderer.reply(
        '<think>\nhm\n</think>\n\nI look.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    )
    assert reply == Reply("hm", "I look.", (Call("f", {"x": 1}),))
    assert bind(tok, official.CHATML).reply("Action: f\nAction Input: {}").calls == (Call("f", {}),)


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
        [
            (None, "template: chatml"),
            ("{% for m in messages %}{{ m.content + '###' }}{% endfor %}", "learn to stop"),
            ("{% for m in messages %}", "cannot render"),
        ],
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

    def test_wrong_ends(self, tok):
        with pytest.raises(TemplateError, match="must end with a response"):
            bind(tok).pairs(TALK[1:3])
        with pytest.raises(TemplateError, match="must end with a user"):
            bind(tok).prompt(TALK[:2])
        with pytest.raises(TemplateError, match="given apart"):
            bind(tok).pairs((Message("system", "S"), *TALK))

    def test_an_order_that_the_template_refuses(self, tok):
        with pytest.raises(TemplateError, match="must alternate"):
            bind(tok, official.MISTRAL).pairs((TALK[0], *TALK[:2]))

    def test_a_system_prompt_that_the_template_drops(self, tok):
        deaf = "{% for m in messages if m.role != 'system' %}" + official.CHATML.partition("%}")[2]
        renderer = bind(tok, deaf)
        assert renderer.pairs(TALK)
        with pytest.raises(TemplateError, match="leaves out the system prompt: 'S1'"):
            renderer.prompt(TALK[:1], system="S1")

    def test_tools_that_the_template_drops(self, tok):
        with pytest.raises(TemplateError, match="leaves out tools that may be called .add"):
            bind(tok).prompt(TALK[:1], tools='[{"name": "add"}]')

    def test_a_thought_that_the_template_drops(self, tok):
        forgetful = official.CHATML.replace("m.content +", "m.content.split('</think>')[-1] +")
        with pytest.raises(TemplateError, match="leaves out the thought of a response: .hm"):
            bind(tok, forgetful).pairs((TALK[0], Message("assistant", "<think>hm</think>A")))

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

    @pytest.mark.parametrize(
        ("keys", "said"),
        [({"enable_thinking": False}, "thoughts are removed"), ({"preserve_thinking": True}, "no effect")],
    )
    def test_a_key_the_template_does_not_know_warns(self, tok, caplog, keys, said):
        bind(tok, **keys)
        assert said in caplog.text

    def test_thoughts_are_removed_where_they_are_switched_off(self, tok):
        talk = (TALK[0], Message("assistant", "<think>\nhm\n</think>\n\nA1"))
        for template in (official.CHATML, official.QWEN3):
            renderer = bind(copy.deepcopy(tok), template, enable_thinking=False)
            assert tok.decode(renderer.pairs(talk)[0][1]) == "A1<|im_end|>\n"
        assert tok.decode(bind(tok).pairs(talk)[0][1]) == "<think>\nhm\n</think>\n\nA1<|im_end|>\n"

    def test_the_clock_is_never_asked(self, tok):
        dated = "{{ strftime_now('%Y-%m-%d') }}" + official.CHATML
        assert tok.decode(bind(tok, dated).prompt(TALK[:1])).startswith("2024-07-26")
        assert tok.decode(bind(tok, dated, date_string="01 May 2030").prompt(TALK[:1])).startswith("2030-05-01")
        with pytest.raises(ConfigError, match="no day such as"):
            bind(tok, dated, date_string="tomorrow")
        assert bind(tok, official.CHATML, date_string="tomorrow")

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
    monkeypatch.setattr(ChatText, "_apply", lambda *_, **__: pytest.fail("rendered twice"))
    assert renderer.pairs(TALK, system="S") == expected


def test_what_was_warm_is_no_answer_to_another_question(tok):
    renderer = bind(tok, official.QWEN3)
    other = (Message("user", "U3"), *TALK[1:])
    renderer.warm(renderer.texts(Example(TALK[:1], (Answer(TALK[1:2]),))))
    with pytest.raises(TemplateError, match="one sequence"):
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
