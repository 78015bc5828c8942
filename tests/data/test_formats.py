"""Rows to Examples: LLaMA-Factory's reading of each format, and a reason for every row that cannot be used."""

from __future__ import annotations

import json
import math

import pytest

from luthier.core.registry import find, names
from luthier.core.types import Answer, Message
from luthier.data.source import COLUMNS, BadRow, Columns, MissingColumn

ALL = Columns(COLUMNS | {name: name for name in ("history", "system", "tools", "chosen", "rejected")})


OPENAI = Columns(COLUMNS | {"messages": "messages"})


def read(format_name, row, columns=ALL):
    return find("formats", format_name).read(row, columns)


def with_names(ranking=False, tags=None, given=(), **changes):
    return Columns({**ALL.names, **changes}, {**ALL.tags, **(tags or {})}, ranking, frozenset(given))


def refused(format_name, row, columns=ALL):
    with pytest.raises(BadRow) as caught:
        read(format_name, row, columns)
    return f"{caught.value.reason} | {caught.value.detail}"


def user(text):
    return Message("user", text)


def assistant(text):
    return Message("assistant", text)


def test_the_formats_there_are():
    assert {"alpaca", "openai", "sharegpt", "text"} <= set(names("formats"))


def test_alpaca():
    row = {
        "instruction": "Add",
        "input": "1 2",
        "output": "3",
        "system": "Be brief",
        "history": [["a", "b"], ["c", "d"]],
    }
    example = read("alpaca", row)
    assert example.prompt == (user("a"), assistant("b"), user("c"), assistant("d"), user("Add\n1 2"))
    (answer,) = example.answers
    assert answer.messages == (assistant("3"),)
    assert math.isnan(answer.score)
    assert (example.system, example.tools, answer.name) == ("Be brief", "", "response")


def test_alpaca_without_input_or_instruction_or_output():
    assert read("alpaca", {"instruction": "Add", "input": "", "output": "3"}).prompt == (user("Add"),)
    assert read("alpaca", {"instruction": "Add", "output": "3"}).prompt == (user("Add"),)
    assert read("alpaca", {"instruction": "", "input": "x", "output": "3"}).prompt == (user("x"),)
    assert read("alpaca", {"instruction": "Add", "output": None}).answers == ()
    text = with_names(prompt="text", query=None, response=None)
    assert read("alpaca", {"text": "a document"}, text).prompt == (user("a document"),)


def test_alpaca_ranking_and_labels():
    row = {"instruction": "q", "chosen": "good", "rejected": "bad"}
    assert read("alpaca", row, with_names(ranking=True)).answers == (
        Answer((assistant("good"),), 1.0, "chosen"),
        Answer((assistant("bad"),), 0.0, "rejected"),
    )
    liked = with_names(kto_tag="label")
    for label, score in ((True, 1.0), (False, -1.0)):
        (answer,) = read("alpaca", {"instruction": "q", "output": "a", "label": label}, liked).answers
        assert answer == Answer((assistant("a"),), score, "response")


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"instruction": "", "input": "", "output": "a"}, ALL, "empty prompt"),
        ({"instruction": "q", "output": ""}, ALL, "empty response"),
        ({"instruction": "q", "output": 3}, ALL, "response is not text | 3 (int)"),
        ({"instruction": ["q"], "output": "a"}, ALL, "'instruction' is not text"),
        ({"instruction": "q", "output": "a", "history": "no"}, ALL, "history is not a list"),
        ({"instruction": "q", "output": "a", "history": [["a"]]}, ALL, "history is not a list"),
        ({"instruction": "q", "output": "a", "history": [["a", None]]}, ALL, "history is not a list"),
        ({"instruction": "q", "output": "a", "label": 1}, with_names(kto_tag="label"), "'label' is not true or false"),
        ({"instruction": "q", "chosen": "a", "rejected": 2}, with_names(ranking=True), "rejected is not text"),
        ({"instruction": "q", "chosen": "", "rejected": "b"}, with_names(ranking=True), "empty chosen"),
    ],
)
def test_alpaca_rows_that_cannot_be_used(row, columns, expected):
    assert expected in refused("alpaca", row, columns)


def test_missing_columns_say_which():
    with pytest.raises(MissingColumn) as caught:
        read("alpaca", {"prompt": "q", "output": "a"})
    assert (caught.value.meaning, caught.value.column) == ("prompt", "instruction")
    with pytest.raises(MissingColumn) as caught:
        read("alpaca", {"instruction": "q", "chosen": "a"}, with_names(ranking=True))
    assert caught.value.column == "rejected"
    with pytest.raises(MissingColumn) as caught:
        read("sharegpt", {"messages": []})
    assert caught.value.column == "conversations"
    with pytest.raises(MissingColumn):
        read("text", {"body": "x"})


def talk(*turns):
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


def test_sharegpt():
    tools = [{"name": "add", "parameters": {}}]
    row = talk(
        ("system", "inner"), ("human", "q"), ("function_call", "{}"), ("observation", "r"), ("gpt", "a")
    ) | {"system": "outer", "tools": tools}  # fmt: skip
    example = read("sharegpt", row)
    assert example.prompt == (user("q"), Message("function", "{}"), Message("observation", "r"))
    assert example.answers[0].messages == (assistant("a"),)
    assert example.system == "inner"
    assert json.loads(example.tools) == tools
    row["conversations"].pop(0)
    assert read("sharegpt", row | {"tools": "as text"}).system == "outer"
    assert read("sharegpt", row | {"tools": "as text"}).tools == "as text"


def test_sharegpt_may_end_with_a_call_and_carry_weights():
    row = talk(("human", "q"), ("function_call", "{}"))
    row["conversations"][1]["weight"] = 0.5
    assert read("sharegpt", row).answers[0].messages == (Message("function", "{}", 0.5),)


@pytest.mark.parametrize(
    ("said", "weight"),
    [({"loss": False}, 0.0), ({"loss": 1}, 1.0), ({"loss": 0.5}, 0.5), ({"loss": True, "weight": 1}, 1.0), ({}, None)],
)
def test_loss_and_weight_of_a_message(said, weight):
    for name, row, columns in (
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "q", "loss": 0}, {"from": "gpt", "value": "a"}]},
            ALL,
        ),
        ("openai", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, OPENAI),
    ):
        next(iter(row.values()))[1].update(said)
        assert read(name, row, columns).answers[0].messages[0].weight == weight


@pytest.mark.parametrize("roles", ["human human gpt", "gpt human gpt", "human gpt gpt", "human gpt system human gpt"])
def test_turns_stand_in_any_order(roles):
    row = talk(*((role, str(nth)) for nth, role in enumerate(roles.split())))
    example = read("sharegpt", row)
    words = {"human": "user", "gpt": "assistant", "system": "system"}
    assert [(m.role, m.content) for m in (*example.prompt, *example.answers[0].messages)] == [
        (words[role], str(nth)) for nth, role in enumerate(roles.split())
    ]
    assert example.system == ""


def test_sharegpt_with_other_names():
    columns = with_names(
        messages="talk",
        kto_tag="label",
        tags={"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "you"},
    )
    row = {"talk": [{"who": "me", "what": "q"}, {"who": "you", "what": "a"}], "label": False}
    example = read("sharegpt", row, columns)
    assert example.prompt == (user("q"),)
    assert example.answers == (Answer((assistant("a"),), -1.0),)


def test_sharegpt_ranking():
    row = talk(("human", "q")) | {"chosen": {"from": "gpt", "value": "good"}, "rejected": "bad"}
    example = read("sharegpt", row, with_names(ranking=True))
    assert example.prompt == (user("q"),)
    assert example.answers == (
        Answer((assistant("good"),), 1.0, "chosen"),
        Answer((assistant("bad"),), 0.0, "rejected"),
    )


def test_a_conversation_that_ends_with_a_question_is_a_prompt():
    example = read("sharegpt", talk(("human", "q"), ("gpt", "a"), ("human", "r")))
    assert len(example.prompt) == 3
    assert example.answers == ()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (talk(("human", "q"), ("bot", "a")), "unknown role | message 2: 'bot' (str) is none of human, gpt"),
        (talk(("human", "q"), ("gpt", None)), "a message that is not text | message 2: None"),
        (talk(("human", "q"), ("gpt", "")), "empty response"),
        (talk(("system", "s")), "empty conversation"),
        (talk(), "empty conversation"),
        ({"conversations": "q"}, "'conversations' is not a list"),
        ({"conversations": [{"role": "user", "content": "q"}]}, "with role and content it is formatting: openai"),
        ({"conversations": ["q"]}, "a message without"),
        ({"conversations": [{"from": "human", "value": "q", "weight": -1}]}, "a message weight"),
        ({"conversations": [{"from": "gpt", "value": "q", "loss": "no"}]}, "a message loss that is not a number"),
        ({"conversations": [{"from": "gpt", "value": "q", "loss": True, "weight": 0.5}]}, "a loss that differ"),
        (
            {"conversations": [{"from": "human", "value": "q", "loss": 1}, {"from": "gpt", "value": "a"}]},
            "a loss weight on a turn that the model does not speak | turn 1, of user",
        ),
    ],
)
def test_sharegpt_rows_that_cannot_be_used(row, expected):
    assert expected in refused("sharegpt", row)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (talk(("human", "q"), ("gpt", "a")) | {"chosen": "a", "rejected": "b"}, "before chosen and rejected"),
        (
            talk(("human", "q")) | {"chosen": {"from": "human", "value": "a"}, "rejected": "b"},
            "chosen is a user message",
        ),
    ],
)
def test_rankings_that_cannot_be_used(row, expected):
    assert expected in refused("sharegpt", row, with_names(ranking=True))


def test_openai():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = {
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1", "tool_call_id": "1"},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "a", "weight": 0},
        ]
    }
    example = read("openai", row, OPENAI)
    assert example.system == "s"
    assert [m.role for m in example.prompt] == ["user", "function", "observation", "observation"]
    assert example.prompt[0].content == "q"
    assert json.loads(example.prompt[1].content) == [{"name": "add", "arguments": {"a": 1}}]
    assert [m.content for m in example.prompt[2:]] == ["1", "2"]
    assert example.answers[0].messages == (Message("assistant", "a", 0.0),)


def test_openai_keeps_what_is_said_before_a_call():
    call = {"function": {"name": "add", "arguments": {}}}
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "Let me.", "tool_calls": [call]},
        ]
    }
    (message,) = read("openai", row, OPENAI).answers[0].messages
    assert message.role == "function"
    assert message.content.startswith("Let me.")
    assert message.content.count("Let me.") == message.content.count('"add"') == 1


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"role": "bot", "content": "a"}, "unknown role"),
        ({"content": "a"}, "a message without 'role'"),
        ({"from": "gpt", "value": "a"}, "with from and value it is formatting: sharegpt"),
        ({"role": "assistant", "content": [{"type": "image_url"}]}, "a message that is not text"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "a tool call without a name"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "not JSON"),
        ({"role": "assistant", "content": None}, "empty response"),
    ],
)
def test_openai_rows_that_cannot_be_used(turn, expected):
    assert expected in refused("openai", {"messages": [{"role": "user", "content": "q"}, turn]}, OPENAI)


def test_text():
    assert read("text", {"text": "a"}).prompt == (user("a"),)
    assert read("text", {"text": "a"}).answers == ()
    assert read("text", {"prompt": "b"}).prompt == (user("b"),)
    assert read("text", {"text": "a", "body": "c"}, with_names(prompt="body", given=["prompt"])).prompt == (user("c"),)
    assert "empty text" in refused("text", {"text": ""})
    assert "'text' is not text | None" in refused("text", {"text": None})
