"""The table of enable_thinking, through the template qwen3."""

from __future__ import annotations

import json

import pytest

from luthier.core.types import Message
from luthier.data.encode import prepare
from luthier.data.renderer import make_renderer
from luthier.data.source import DataConfig
from luthier.data.template import TemplateConfig
from luthier.objectives.sft import Sft, SftConfig
from tests.conftest import build_tokenizer

EMPTY = "<think>\n\n</think>\n\n"
THOUGHT = "<think>\nhm\n</think>\n\n"
ASK = "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tok():
    return build_tokenizer(extra_specials=("<think>", "</think>"))


def talk(*answers):
    return [message for answer in answers for message in (Message("user", "U"), Message("assistant", answer))]


def bind(tok, enable=True, preserve=False):
    return make_renderer(TemplateConfig(template="qwen3", enable_thinking=enable, preserve_thinking=preserve), tok)


def parts(tok, pairs):
    """What each prompt has beside the question, and each response beside its end."""
    shown = [(tok.decode(source), tok.decode(response)) for source, response in pairs]
    assert all(source.startswith(ASK) and response.endswith("<|im_end|>\n") for source, response in shown)
    return [(source.removeprefix(ASK), response.removesuffix("<|im_end|>\n")) for source, response in shown]


@pytest.mark.parametrize(
    ("enable", "answer", "expected"),
    [
        (True, THOUGHT + "A", ("", THOUGHT + "A")),
        (True, "A", ("", EMPTY + "A")),
        (False, THOUGHT + "A", (EMPTY, "A")),
        (False, "A", (EMPTY, "A")),
        (None, THOUGHT + "A", ("", THOUGHT + "A")),
        (None, "A", (EMPTY, "A")),
        (True, "half a thought</think>A", ("", "half a thought</think>A")),
        (False, THOUGHT + "\n\nA" + THOUGHT, (EMPTY, "A")),
    ],
)
def test_one_exchange(tok, enable, answer, expected):
    renderer = bind(tok, enable)
    assert parts(tok, renderer.pairs(talk(answer))) == [expected]
    assert parts(tok, [renderer.oneturn(talk(answer))]) == [expected]


@pytest.mark.parametrize(
    ("enable", "preserve", "mask_history", "expected"),
    [
        (True, False, False, [("", THOUGHT + "A"), ("", EMPTY + "B"), ("", THOUGHT + "C")]),
        (True, False, True, [("", "A"), ("", "B"), ("", THOUGHT + "C")]),
        (True, True, True, [("", THOUGHT + "A"), ("", EMPTY + "B"), ("", THOUGHT + "C")]),
        (False, False, False, [(EMPTY, "A"), (EMPTY, "B"), (EMPTY, "C")]),
        (False, False, True, [("", "A"), ("", "B"), (EMPTY, "C")]),
        (None, False, False, [("", THOUGHT + "A"), (EMPTY, "B"), ("", THOUGHT + "C")]),
        (None, False, True, [("", "A"), ("", "B"), ("", THOUGHT + "C")]),
    ],
)
def test_a_conversation(tok, enable, preserve, mask_history, expected):
    messages = talk(THOUGHT + "A", "B", THOUGHT + "C")
    assert parts(tok, bind(tok, enable, preserve).pairs(messages, mask_history=mask_history)) == expected


@pytest.mark.parametrize(("preserve", "history"), [(False, "A"), (True, THOUGHT + "A")])
def test_history_of_one_turn_and_of_prompts(tok, preserve, history):
    renderer = bind(tok, True, preserve)
    messages = talk(THOUGHT + "A", "B")
    source, response = renderer.oneturn(messages)
    assert tok.decode(source) == f"{ASK}{history}<|im_end|>\n{ASK}"
    assert tok.decode(response) == EMPTY + "B<|im_end|>\n"
    assert renderer.prompt(messages[:3]) == source


@pytest.mark.parametrize(("enable", "ending"), [(True, ""), (False, EMPTY), (None, EMPTY)])
def test_a_prompt_ends_as_training_had_it(tok, enable, ending):
    renderer = bind(tok, enable)
    assert tok.decode(renderer.prompt(talk("A")[:1])) == ASK + ending
    assert renderer.prompt(talk("A")[:1]) == renderer.pairs(talk("A"))[0][0]


def test_a_call_keeps_its_thought(tok):
    call = THOUGHT + '{"name": "f", "arguments": {}}'
    [(_, response)] = bind(tok).pairs([Message("user", "U"), Message("function", call)])
    assert tok.decode(response) == (THOUGHT + '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>\n')


def test_messages_are_left_as_they_were(tok):
    messages = talk(THOUGHT + "A", "B")
    copy = list(messages)
    bind(tok, False).pairs(messages)
    bind(tok, False).oneturn(messages)
    assert messages == copy


class TestRowsThatNoServerSends:
    """Counted, and told with the two keys that mend it."""

    ANSWERS = (("A", "B"), (THOUGHT + "A", THOUGHT + "B"), (THOUGHT + "A",), ("half</think>A", "B"))
    TOLD = "2 rows of several turns are trained with thoughts in their history"

    @pytest.fixture
    def told(self, tok, tmp_path):
        """(how many rows are counted, the report) of a run with these keys."""
        file = tmp_path / "talks.jsonl"
        rows = [{"messages": [{"role": m.role, "content": m.content} for m in talk(*row)]} for row in self.ANSWERS]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

        def run(stage=None, streaming=False, **keys):
            config = DataConfig(dataset=str(file), data_cache_dir=str(tmp_path / "cache"), streaming=streaming)
            renderer = make_renderer(TemplateConfig(**{"template": "qwen3", **keys}), tok)
            prepared = prepare(config, stage or Sft(), renderer, cutoff_len=512, seed=0)
            return (
                prepared if streaming else (prepared.report.total.unserved_rows, " ".join(str(prepared.report).split()))
            )

        return run

    def test_one_sequence(self, told):
        count, report = told()
        assert count == 2
        assert self.TOLD in report
        assert "branch_thinking: true" in report and "preserve_thinking: true" in report
        assert told() == (count, report)  # from the cache

    @pytest.mark.parametrize(
        "keys",
        [
            {"branch_thinking": True},
            {"preserve_thinking": True},
            {"template": "qwen3_nothink"},
            {"stage": Sft(SftConfig(mask_history=True))},
        ],
    )
    def test_none_where_it_is_mended_or_nothing_differs(self, told, keys):
        count, report = told(**keys)
        assert count == 0 and "branch_thinking" not in report

    def test_a_stream_tells_it_of_its_first_rows(self, told, caplog):
        told(streaming=True).stream.sample()
        [record] = caplog.records
        assert "talks.jsonl: of the first 4 rows, " + self.TOLD in record.getMessage()
