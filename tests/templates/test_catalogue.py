"""Every template of the catalogue, against texts written by hand and against what must hold of all."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.registry import every
from luthier.core.types import Message
from luthier.data.renderer import make_renderer
from luthier.data.template import TemplateConfig, find_template
from tests.templates import golden, official
from tests.templates.golden_more import DBRX, EMPTY, MORE, MORE_EFFICIENT, MORE_PLAIN, MORE_TERMINATORS, OWN_ENDS

GOLDEN = golden.GOLDEN | MORE
PLAIN = golden.PLAIN | MORE_PLAIN
EFFICIENT = golden.EFFICIENT | MORE_EFFICIENT
NAMES = sorted(name for module in every("templates") for name in module.TEMPLATES)
TERMINATOR = {
    name: token for table in (golden.TERMINATORS, MORE_TERMINATORS) for token, names in table.items() for name in names
}
SHAPES = sorted({find_template(name): name for name in reversed(NAMES)}.values())
"""One name for each template that is not the same as another."""
TALK = (Message("user", "U1"), Message("assistant", "A1"), Message("user", "U2"), Message("assistant", "A2"))


def bind(name, tokenizer, **keys):
    return make_renderer(TemplateConfig(template=name, **keys), tokenizer)


def shown(tokenizer, pairs):
    return "".join(f"{tokenizer.decode(source)}[[{tokenizer.decode(response)}]]" for source, response in pairs)


def test_the_table_of_expectations_is_complete():
    assert set(GOLDEN) == set(NAMES)
    assert set(TERMINATOR) | EFFICIENT | {"empty"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_renders_as_written_by_hand(name, tok):
    assert shown(tok, bind(name, tok).pairs(TALK, system="S")) == GOLDEN[name]


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_without_a_system_prompt(name, tok):
    text = tok.decode(bind(name, tok).pairs(TALK)[0][0])
    assert text.startswith(PLAIN[name] + "U1")


def test_every_default_system_prompt_is_looked_at(tok):
    told = {name for name in NAMES if find_template(name).default_system}
    assert told - {"dbrx"} <= set(PLAIN)
    text = tok.decode(bind("dbrx", tok).pairs(TALK)[0][0])
    assert text.startswith(f"<|im_start|>system\n{DBRX[0]}")
    assert f"{DBRX[1]}<|im_end|>\n<|im_start|>user\nU1" in text


@pytest.mark.parametrize("name", NAMES)
def test_a_turn_ends_with_its_terminator_which_also_stops_generation(name, tok):
    renderer = bind(name, tok)
    for _, response in renderer.pairs(TALK):
        ids = list(response)
        while ids and not tok.decode(ids[-1:]).strip():
            ids.pop()
        if name in TERMINATOR:
            assert tok.decode(ids[-1:]) == TERMINATOR[name]
            assert response.count(ids[-1]) == 1
            assert ids[-1] in renderer.stop_ids
        else:
            assert tok.decode(ids).removesuffix(OWN_ENDS.get(name, ""))[-2:] in ("A1", "A2")
    assert renderer.efficient_eos == (name in EFFICIENT)
    assert tok.eos_token_id in renderer.stop_ids
    assert tok.pad_token == "<pad>"


@pytest.mark.parametrize("name", NAMES)
def test_bos_stands_where_the_text_has_it_and_nowhere_else(name, tok):
    ids = [token for pair in bind(name, tok).pairs(TALK, system="S") for part in pair for token in part]
    assert ids.count(tok.bos_token_id) == GOLDEN[name].count("<s>")
    headed = ("llama2", "llama2_zh", "seed_coder", "seed_oss", "atom")  # bos is the header of their turns
    assert GOLDEN[name].count("<s>") in ({2, 4, 5} if name in headed else {0, 1})


@pytest.mark.parametrize("name", SHAPES)
def test_prompts_are_what_training_saw_before_each_response(name, tok):
    renderer = bind(name, tok, enable_thinking=True)
    pairs = renderer.pairs(TALK, system="S")
    assert renderer.prompt(TALK[:1], system="S") == pairs[0][0]
    source, response = renderer.oneturn(TALK[:2], system="S")
    assert (source, response) == pairs[0]
    if not find_template(name).reasoning:
        assert renderer.prompt(TALK[:3], system="S") == pairs[0][0] + pairs[0][1] + pairs[1][0]
        assert renderer.oneturn(TALK, system="S") == (pairs[0][0] + pairs[0][1] + pairs[1][0], pairs[1][1])


@pytest.mark.parametrize("name", SHAPES)
def test_survives_pickling_and_warming_without_a_change_of_ids(name, tok):
    from luthier.core.types import Answer, Example

    renderer = bind(name, tok)
    expected = renderer.pairs(TALK, system="S")
    renderer.warm(renderer.texts(Example(TALK[:3], (Answer(TALK[3:]),), system="S")))
    assert renderer.pairs(TALK, system="S") == expected
    other = pickle.loads(pickle.dumps(renderer))
    assert other.pairs(TALK, system="S") == expected
    assert other.fingerprint() == renderer.fingerprint()


def test_warmed_texts_are_all_that_pairs_asks_for(tok, monkeypatch):
    from luthier.core.types import Answer, Example

    renderer = bind("qwen", tok)
    expected = renderer.pairs(TALK, system="S")
    renderer.warm(renderer.texts(Example(TALK[:3], (Answer(TALK[3:]),), system="S")))
    monkeypatch.setattr(type(tok), "__call__", lambda *_, **__: pytest.fail("tokenised one by one"))
    assert renderer.pairs(TALK, system="S") == expected


WILD = st.text(
    st.one_of(st.sampled_from(" \n\t{}|<>\u00a0\u3000é你"), st.characters(exclude_categories=["Cs"])), max_size=40
)


@pytest.mark.parametrize("name", SHAPES)
def test_supervised_text_is_the_response_and_its_end_to_the_letter(name, tok):
    renderer = bind(name, tok)
    expected = re.findall(r"\[\[(.*?)\]\]", GOLDEN[name], re.DOTALL)

    @settings(max_examples=6, deadline=None, derandomize=True)
    @given(first=WILD, second=WILD, question=WILD)
    def check(first, second, question):
        talk = (Message("user", question), Message("assistant", first), TALK[2], Message("assistant", second))
        pairs = renderer.pairs(talk)
        for (_, response), form, text in zip(pairs, expected, (first, second)):
            assert tok.decode(response) == form.replace("A1", text).replace("A2", text)
        assert question in "".join(tok.decode(source) + tok.decode(response) for source, response in pairs)

    check()


@pytest.mark.parametrize("name", ["chatml", "chatglm3", "llama2", "mistral"])
def test_text_that_looks_like_a_slot_is_text(name, tok):
    talk = (Message("user", "{{idx}} {{content}}"), Message("assistant", "{{content}}{{idx}}"))
    [(source, response)] = bind(name, tok).pairs(talk, system="{{content}}")
    assert "{{idx}} {{content}}" in tok.decode(source)
    assert tok.decode(source).count("{{content}}") == 2
    assert "{{content}}{{idx}}" in tok.decode(response)


def test_templates_cannot_be_changed():
    template = find_template("qwen")
    with pytest.raises(AttributeError):
        template.default_system = "mine"
    assert hash(template) == hash(copy.deepcopy(template))


def test_options_of_one_run_do_not_reach_the_next(tok):
    other = copy.deepcopy(tok)
    bind("qwen", tok, default_system="mine", tool_format="llama3", enable_thinking=False)
    assert shown(other, bind("qwen", other).pairs(TALK)) == GOLDEN["qwen"].replace(
        "S<", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<"
    )


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("system", ["S", ""])
def test_a_tokenizer_without_chat_template_is_given_this_one(name, system, tok):
    renderer = bind(name, tok)
    talk = (Message("user", "it's {{ x }}\\n"), *TALK[1:])
    dicts = [{"role": "system", "content": system}] + [{"role": m.role, "content": m.content} for m in talk]
    ours = "".join(tok.decode(part) for pair in renderer.pairs(talk, system=system) for part in pair)
    if find_template(name).reasoning:
        ours = ours.replace(EMPTY.get(name, "<think>\n\n</think>\n\n"), "")
    assert tok.apply_chat_template(dicts, tokenize=False) == ours
    assert tok.apply_chat_template(dicts[1:4], tokenize=False, add_generation_prompt=True) == tok.decode(
        renderer.prompt(talk[:3])
    )


@pytest.mark.parametrize("thinking", [False, None])
def test_it_asks_as_the_renderer_asks(thinking, tok):
    renderer = bind("qwen3", tok, enable_thinking=thinking)
    asked = tok.apply_chat_template([{"role": "user", "content": "U1"}], tokenize=False, add_generation_prompt=True)
    assert asked == tok.decode(renderer.prompt(TALK[:1]))
    assert asked.endswith("<think>\n\n</think>\n\n")


def test_the_makers_chat_template_is_kept_and_a_difference_told(tok, caplog):
    tok.chat_template = official.SMOLLM2
    bind("qwen3_nothink", tok)
    assert tok.chat_template == official.SMOLLM2
    assert "named SmolLM" in caplog.text
    caplog.clear()
    tok.chat_template = official.QWEN25
    bind("qwen", tok)
    assert not caplog.records
    bind("chatml", tok)
    assert tok.chat_template != official.QWEN25
