"""K answers to one prompt as paths: the same prompt ids everywhere, cut by one rule."""

from __future__ import annotations

import pytest

from luthier.core.types import Answer, Example, Message
from luthier.data.answers import encode_answers, prompt_length
from luthier.data.renderer import make_renderer
from luthier.data.source import BadRow
from luthier.data.template import TemplateConfig
from tests.conftest import build_tokenizer


def example(*texts: str, prompt: str = "hello") -> Example:
    answers = tuple(Answer((Message("assistant", t),), float(-n), f"candidate-{n}") for n, t in enumerate(texts))
    return Example((Message("user", prompt),), answers)


@pytest.mark.parametrize("template", ["chatml", "llama2", "qwen3"])
@pytest.mark.parametrize("cutoff_len", [24, 40, 60, 200])
def test_all_answers_share_the_prompt_and_fit(template, cutoff_len):
    renderer = make_renderer(TemplateConfig(template=template), build_tokenizer(extra_specials=("<think>", "</think>")))
    texts = ("The quick brown fox jumps over the lazy dog.", "Paris.", "one two three four five")
    (encoded,) = encode_answers(
        example(*texts, prompt="What is the capital of France? " * 3), renderer, cutoff_len=cutoff_len
    )
    prompts = {tuple(path.ids[: prompt_length(path)]) for path in encoded.paths}
    assert len(prompts) == 1 and all(prompts)
    for path in encoded.paths:
        assert len(path.ids) <= cutoff_len
        assert set(path.weights[: prompt_length(path)]) == {0.0} and set(path.weights[prompt_length(path) :]) == {1.0}
    assert [path.score for path in encoded.paths] == [0.0, -1.0, -2.0]


def test_answers_that_nothing_tells_apart_are_refused():
    renderer = make_renderer(TemplateConfig(template="chatml"), build_tokenizer())
    with pytest.raises(BadRow, match="all answers are the same"):
        encode_answers(example("Paris.", "Paris."), renderer, cutoff_len=100)
    long = "one two three four five six seven eight nine ten "
    with pytest.raises(BadRow, match="once they are cut to cutoff_len=20"):
        encode_answers(example(long * 9 + "yes", long * 9 + "no"), renderer, cutoff_len=20)
    assert encode_answers(example("Paris.", "Paris.", "Rome."), renderer, cutoff_len=100)
