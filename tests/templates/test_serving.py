"""For every template: what a chat asks the model is what training put before the response, and nothing merges."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.errors import TemplateError
from luthier.core.types import Answer, Example, Message
from luthier.data.renderer import make_renderer
from luthier.data.template import TemplateConfig, find_template
from luthier.objectives.sft import Sft, SftConfig
from tests.templates.test_catalogue import NAMES, SHAPES

TOOLS = json.dumps([{"name": "add", "description": "d", "parameters": {"properties": {"a": {"type": "integer"}}}}])
CALL = Message("function", '{"name": "add", "arguments": {"a": 1}}')
REASONING = [name for name in SHAPES if find_template(name).reasoning]


def talk_of(name, *, thoughts: bool):
    """Two exchanges with a call of a tool in the first, and thoughts in the template's words if wanted."""
    before, after = find_template(name).thought_words
    thought = f"{before}hm{after}" if thoughts else ""
    call = Message("function", thought + CALL.content)
    return (
        Message("user", "U1"),
        call,
        Message("observation", "42"),
        Message("assistant", thought + "A1"),
        Message("user", "U2"),
        Message("assistant", "A2"),
    )


def rows(renderer, talk, **keys):
    """(what stands before each trained stretch, the stretch) of the training row, over all its paths."""
    given = {"system": "S", "tools": TOOLS}
    example = Example(tuple(talk[:-1]), (Answer((talk[-1],)),), **given)
    found = []
    for encoded in Sft(SftConfig(**keys)).encode(example, renderer, cutoff_len=10_000):
        for path in encoded.paths:
            stretches = itertools.groupby(range(len(path.ids)), key=lambda at: path.weights[at] > 0)
            for trained, places in stretches:
                first, *rest = places
                if trained:
                    found.append((path.ids[:first], path.ids[first : [first, *rest][-1] + 1]))
    return found


def prompts(renderer, talk):
    given = {"system": "S", "tools": TOOLS}
    spoken = [place for place, message in enumerate(talk) if message.role in ("assistant", "function")]
    return [renderer.prompt(talk[:place], **given) for place in spoken]


def bind(tok, name, **keys):
    return make_renderer(TemplateConfig(template=name, **{"branch_thinking": True, **keys}), tok)


WAYS = [(name, True, False) for name in SHAPES if name not in REASONING] + [
    (name, thinking, preserve) for name in REASONING for thinking in (True, False, None) for preserve in (False, True)
]


@pytest.mark.parametrize(("name", "thinking", "preserve"), WAYS)
def test_the_prompt_of_a_chat_is_that_of_the_row(name, thinking, preserve, tok):
    renderer = bind(tok, name, enable_thinking=thinking, preserve_thinking=preserve)
    # null trains what it finds: a turn that thinks as `true` would ask for it, a turn that does not as null asks.
    thinker = bind(tok, name, enable_thinking=True, preserve_thinking=preserve) if thinking is None else renderer
    for thoughts in (False, True) if find_template(name).reasoning else (False,):
        talk = talk_of(name, thoughts=thoughts)
        asked = [*prompts(thinker if thoughts else renderer, talk)[:2], prompts(renderer, talk)[2]]
        trained = rows(renderer, talk)
        ends = [stretch for stretch in trained if stretch[1] == [tok.eos_token_id]]
        told = [stretch for stretch in trained if stretch not in ends]
        assert sorted(before for before, _ in told) == sorted(asked)
        if renderer.efficient_eos:  # the last turn of a path carries its end, the others have theirs apart
            assert sum(said[-1] == tok.eos_token_id for _, said in told) + len(ends) == len(asked)
        assert rows(renderer, talk, mask_history=True)[-1][0] == asked[-1]


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(SHAPES)))
def test_templates_of_the_same_shape_are_bound_too(name, tok):
    renderer = make_renderer(TemplateConfig(template=name), tok)
    talk = talk_of(name, thoughts=False)
    assert prompts(renderer, talk)[-1] == rows(renderer, talk, mask_history=True)[-1][0]


@pytest.mark.parametrize("name", REASONING)
def test_thoughts_leave_history_unless_preserved(name, tok):
    talk = talk_of(name, thoughts=True)
    thought = find_template(name).thought_words[0] + "hm"
    seen = [
        tok.decode(
            make_renderer(TemplateConfig(template=name, preserve_thinking=preserve), tok).prompt(talk[:5], tools=TOOLS)
        ).count(thought)
        for preserve in (False, True)
    ]
    assert seen == [0, 2]


@pytest.mark.parametrize("name", REASONING)
def test_one_branch_for_each_turn_that_changes_its_face(name, tok):
    renderer = bind(tok, name)
    talk = talk_of(name, thoughts=True)
    assert [len(branch) for branch in renderer.branches(talk)] == [1, 1, 1]
    one_sequence = bind(tok, name, branch_thinking=False)
    assert one_sequence.branches(talk) == [one_sequence.pairs(talk)]
    assert [len(branch) for branch in one_sequence.branches(talk)] == [3]
    kept = make_renderer(TemplateConfig(template=name, preserve_thinking=True), tok)
    assert [len(branch) for branch in kept.branches(talk)] == [3]
    assert kept.branches(talk) == [kept.pairs(talk)]


class TestOrders:
    """Turns that do not alternate."""

    ROLES = {"u": "user", "a": "assistant", "s": "system", "o": "observation"}

    def text(self, tok, name, roles):
        talk = [Message(self.ROLES[role], f"T{nth}") for nth, role in enumerate(roles)]
        renderer = make_renderer(TemplateConfig(template=name, default_system=""), tok)
        return "".join(f"{tok.decode(source)}[[{tok.decode(said)}]]" for source, said in renderer.pairs(talk))

    @pytest.mark.parametrize(
        ("name", "roles", "expected"),
        [
            (
                "chatml", "uua",
                "<|im_start|>user\nT0<|im_end|>\n<|im_start|>user\nT1<|im_end|>\n<|im_start|>assistant\n"
                "[[T2<|im_end|>\n]]",
            ),
            (
                "chatml", "aua",
                "<|im_start|>assistant\n[[T0<|im_end|>\n]]<|im_start|>user\nT1<|im_end|>\n<|im_start|>assistant\n"
                "[[T2<|im_end|>\n]]",
            ),
            (
                "chatml", "uaa",
                "<|im_start|>user\nT0<|im_end|>\n<|im_start|>assistant\n[[T1<|im_end|>\n]]"
                "<|im_start|>assistant\n[[T2<|im_end|>\n]]",
            ),
            (
                "chatml", "uasua",
                "<|im_start|>user\nT0<|im_end|>\n<|im_start|>assistant\n[[T1<|im_end|>\n]]"
                "<|im_start|>system\nT2<|im_end|>\n<|im_start|>user\nT3<|im_end|>\n<|im_start|>assistant\n"
                "[[T4<|im_end|>\n]]",
            ),
            (
                "llama3", "uooa",
                "<s><|start_header_id|>user<|end_header_id|>\n\nT0<|eot_id|>"
                "<|start_header_id|>ipython<|end_header_id|>\n\nT1<|eot_id|>"
                "<|start_header_id|>ipython<|end_header_id|>\n\nT2<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n[[T3<|eot_id|>]]",
            ),
            ("seed_coder", "uua", "<s>user\nT0</s><s>user\nT1</s><s>assistant\n[[T2</s>]]"),
            ("chatglm3", "uua", "[gMASK]sop<|user|>\nT0<|user|>\nT1<|assistant|>[[\nT2]]"),
            ("gemma", "aua", "<s><start_of_turn>model\n[[T0<end_of_turn>\n]]<start_of_turn>user\nT1<end_of_turn>\n"
                "<start_of_turn>model\n[[T2<end_of_turn>\n]]"),
            ("deepseek3", "uasa", "<s><｜User｜>T0<｜Assistant｜>[[T1</s>]]T2<｜Assistant｜>[[T3</s>]]"),
        ],
    )  # fmt: skip
    def test_written_as_the_model_would_read_it(self, tok, name, roles, expected):
        assert self.text(tok, name, roles) == expected

    @pytest.mark.parametrize(
        ("name", "roles", "why"),
        [
            ("mistral", "uua", "needs turns"),
            ("vicuna", "aua", "needs turns"),
            ("gemma", "uasua", "no place for a system message"),
            ("chatml", "sua", "given apart"),
        ],
    )
    def test_refused_with_the_reason(self, tok, name, roles, why):
        with pytest.raises(TemplateError, match=why):
            self.text(tok, name, roles)

    @pytest.mark.parametrize("name", ["chatml", "llama3", "seed_coder", "chatglm3", "deepseek3", "phi4"])
    @pytest.mark.parametrize("roles", ["uua", "aua", "uaa", "uasua", "uoua"])
    def test_the_chat_template_that_is_saved_writes_the_same(self, tok, name, roles):
        written = self.text(tok, name, roles).replace("[[", "").replace("]]", "")
        words = self.ROLES | {"o": "tool"}
        talk = [{"role": words[role], "content": f"T{nth}"} for nth, role in enumerate(roles)]
        assert tok.apply_chat_template(talk, tokenize=False) == written

    def test_the_prompt_of_a_chat_that_begins_with_the_model(self, tok):
        renderer = make_renderer(TemplateConfig(template="chatml"), tok)
        talk = [Message("assistant", "Hello."), Message("user", "U"), Message("assistant", "A")]
        pairs = renderer.pairs(talk)
        assert renderer.prompt(talk[:2]) == pairs[0][0] + pairs[0][1] + pairs[1][0]


def examples(count):
    return settings(max_examples=count, deadline=None, derandomize=True)


@pytest.mark.parametrize("name", [name for name in SHAPES if find_template(name).opening is not None])
def test_any_order_is_written_whole_or_refused(name, tok):
    renderer = bind(tok, name, default_system="")

    @examples(6)
    @given(st.lists(st.sampled_from(["user", "assistant", "observation", "system"]), min_size=1, max_size=7))
    def check(roles):
        talk = [Message(role, f"T{nth}.") for nth, role in enumerate([*roles, "assistant"])]
        try:
            pairs = renderer.pairs(talk)
        except TemplateError:
            assert roles[0] == "system" or ("system" in roles and find_template(name).fuse_system)
            return
        said = [message.content for message in talk if message.role == "assistant"]
        assert len(pairs) == len(said)
        text = "".join(tok.decode(part) for pair in pairs for part in pair)
        places = [text.index(message.content) for message in talk]
        assert places == sorted(places)
        for (_, response), content in zip(pairs, said):
            assert re.findall(r"T\d\.", tok.decode(response)) == [content]

    check()


PIECES = st.text(
    st.one_of(st.sampled_from(" \n\t{}|<>\u00a0\u3000é你"), st.characters(exclude_categories=["Cs"])), max_size=20
)


@pytest.mark.parametrize("name", SHAPES)
def test_no_token_belongs_to_two_slots(name, tok):
    """Each string of a slot is tokenised on its own, so ids are those of the pieces, whatever stands beside them."""
    from luthier.data.template import BOS, EOS, Token

    template = find_template(name)
    renderer = bind(tok, name, enable_thinking=None, default_system="")
    ids = {BOS: tok.bos_token_id, EOS: tok.eos_token_id}
    empty = "".join(template.thought_words) if template.empty_thought is None else template.empty_thought

    def encode(text):
        return tok.encode(text, add_special_tokens=False)

    def pieces(part, content):
        for slot in template.slots(part):
            if isinstance(slot, str):
                yield from encode(slot.replace("{{idx}}", "0").replace("{{content}}", content))
            else:
                yield tok.convert_tokens_to_ids(slot.text) if isinstance(slot, Token) else ids[slot]

    @examples(5)
    @given(question=PIECES, answer=PIECES)
    def check(question, answer):
        [(source, response)] = renderer.pairs((Message("user", question), Message("assistant", answer)))
        thinks = template.reasoning and not any(word.strip() in answer for word in template.thought_words)
        assert source == [*pieces("prefix", ""), *pieces("user", question), *(encode(empty) if thinks else [])]
        assert response == list(pieces("assistant", answer))

    check()
