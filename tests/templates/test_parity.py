"""Every template, every way to ask: the prompt of `infer`, `chat` and servers is what stands before the trained turn.

Where it is not, by design, `data/reasoning.py:UNLIKE` says so, and this test holds that it says so exactly there.
"""

from __future__ import annotations

import itertools
import json

import pytest

from luthier.core.types import Answer, Example, Message
from luthier.data.reasoning import UNLIKE, Reasoning
from luthier.data.renderer import make_renderer
from luthier.data.template import TemplateConfig, find_template
from luthier.objectives.sft import Sft, SftConfig
from tests.templates.test_catalogue import SHAPES

TOOLS = json.dumps([{"name": "add", "description": "d", "parameters": {"properties": {"a": {"type": "integer"}}}}])
CALL = '{"name": "add", "arguments": {"a": 1}}'
THOUGHTS = ("none", "last", "all")
KEYS = [
    {"enable_thinking": enable, "preserve_thinking": preserve, "branch_thinking": branch}
    for enable in (True, False, None)
    for preserve, branch in ((False, False), (True, False), (False, True))
]


def talk_of(template, turns, thoughts, called):
    """That many exchanges, the first with a call of a tool if wanted, with thoughts in the template's words."""
    before, after = template.thought_words
    said = [CALL, "A0"] if called else ["A0"]
    said += [f"A{nth}" for nth in range(1, turns)]
    asked = [Message("user", "U0"), *[Message("observation", "42")] * called]
    asked += [Message("user", f"U{nth}") for nth in range(1, turns)]
    talk = []
    for nth, (question, text) in enumerate(zip(asked, said)):
        thinks = thoughts == "all" or (thoughts == "last" and nth == len(said) - 1)
        answer = (f"{before}T{nth}{after}" if thinks else "") + text
        talk += [question, Message("function" if text == CALL else "assistant", answer)]
    return talk


def trained(renderer, talk, objective, **given):
    """What stands before each response that is trained, in order, in the row that training sees."""
    example = Example(tuple(talk[:-1]), (Answer((talk[-1],)),), **given)
    [encoded] = objective.encode(example, renderer, cutoff_len=100_000)
    found = []
    for path in encoded.paths:
        if path.name.startswith("end-of-turn"):  # where the end of a turn is learnt that the conversation goes on after
            continue
        stretches = itertools.groupby(range(len(path.ids)), key=lambda at: path.weights[at] > 0)
        found += [path.ids[: next(places)] for supervised, places in stretches if supervised]
    return found


def differing(rules, talk, objective):
    """Places in the row of what `UNLIKE` names, and all places."""
    spoken = [place for place, message in enumerate(talk) if message.role in ("assistant", "function")]
    spoken = spoken[-1:] if objective.last_only else spoken
    if rules is None:
        return [], spoken
    return [at for at in spoken if rules.unlike(talk, at, one_sequence=not objective.last_only)], spoken


@pytest.mark.parametrize("name", SHAPES)
def test_the_prompt_that_is_asked_is_the_prompt_that_is_trained(name, tok):
    template = find_template(name)
    empty = "".join(template.thought_words) if template.empty_thought is None else template.empty_thought
    for keys in KEYS if template.reasoning else [{}]:
        renderer = make_renderer(TemplateConfig(template=name, **keys), tok)
        rules = Reasoning(template.thought_words, *keys.values(), empty) if template.reasoning else None
        cases = itertools.product((1, 2, 3), THOUGHTS if rules else ("none",), ("", "S"), (False, True))
        for turns, thoughts, system, called in cases:
            talk = talk_of(template, turns, thoughts, called)
            given = {"system": system, "tools": TOOLS if called else ""}
            renderer.warm(renderer.texts(Example(tuple(talk[:-1]), (Answer((talk[-1],)),), **given)))
            for objective in (Sft(SftConfig()), Sft(SftConfig(mask_history=True)))[: 1 + (bool(system) == called)]:
                unlike, spoken = differing(rules, talk, objective)
                asked = [renderer.prompt(talk[:place], **given) for place in spoken]
                rows = trained(renderer, talk, objective, **given)
                assert len(rows) == len(asked)
                found = [place for place, row, prompt in zip(spoken, rows, asked) if row != prompt]
                assert found == unlike, (keys, turns, thoughts, system, called, objective.last_only)


@pytest.mark.parametrize(
    ("keys", "talk", "expected"),
    [
        ({}, ["A"], []),
        ({}, ["A", "B"], ["history"]),
        ({}, ["<think>\nT\n</think>\n\nA", "B"], ["history"]),
        ({}, ["half</think>A", "B"], []),
        ({"enable": False}, ["A", "B"], ["history"]),
        ({"enable": None}, ["<think>\nT\n</think>\n\nA"], ["own thought"]),
        ({"enable": None}, ["A", "<think>\nT\n</think>\n\nB"], ["history", "own thought"]),
        ({"preserve": True}, ["<think>\nT\n</think>\n\nA", "B"], []),
        ({"branch": True}, ["<think>\nT\n</think>\n\nA", "B"], []),
    ],
)
def test_the_table_says_what_differs(keys, talk, expected):
    rules = Reasoning(**{
        "words": ("<think>\n", "\n</think>\n\n"), "enable": True, "preserve": False, "branch": False,
        "empty": "<think>\n\n</think>\n\n", **keys,
    })  # fmt: skip
    messages = [message for text in talk for message in (Message("user", "U"), Message("assistant", text))]
    assert rules.unlike(messages, len(messages) - 1, one_sequence=True) == expected
    assert set(expected) <= set(UNLIKE)
