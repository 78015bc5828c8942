"""What a stage says its encoding depends on is all it reads: a key left out would leave stale data in the cache."""

from __future__ import annotations

import dataclasses

import pytest
from tests.conftest import build_tokenizer
from tests.exact.runs import OBJECTIVES, objective_of

from luthier.core.types import Answer, Example, Message
from luthier.data.cache import shared_parts
from luthier.data.renderer import make_renderer
from luthier.data.template import TemplateConfig

ROUND = {
    "req_id": "1",
    "place": "x:1",
    "draft": [8, 9],
    "verifier": [8, 10],
    "mismatches": [{"index": 1, "target": 0.5}],
    "unscored": None,
    "text": "hello world",
}


class Watched:
    """A stage's keys, remembering which were asked for."""

    def __init__(self, keys):
        self.keys, self.asked = keys, set()

    def __getattr__(self, name):
        self.asked.add(name)
        return getattr(self.keys, name)


def example_for(objective):
    fewest, _ = objective.answers
    if objective.answers == (0, 0):
        return Example((), (), extra=ROUND)
    texts = ("one two", "three")[: max(fewest, 1)]
    answers = tuple(Answer((Message("assistant", text),), float(2 - n)) for n, text in enumerate(texts))
    return Example((Message("user", "hello"),), answers)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_stage_reads_the_keys_it_names(name):
    objective = objective_of(name)
    named = objective.encoding_keys
    if named is None:
        return
    objective.config = Watched(objective.config)
    renderer = make_renderer(TemplateConfig(template="default"), build_tokenizer())
    found = objective.encode(example_for(objective), renderer, cutoff_len=64)
    objective.gather(found)
    assert found and objective.config.asked == set(named)


def test_only_those_keys_change_what_is_cached():
    renderer = make_renderer(TemplateConfig(template="default"), build_tokenizer())

    def parts(name, **keys):
        objective = objective_of(name)
        objective.config = dataclasses.replace(objective.config, **keys)
        return shared_parts(objective, renderer, 64)

    assert parts("dpo") == parts("dpo", pref_beta=0.5, pref_loss="hinge")
    assert parts("accept_head") == parts("accept_head", freeze_backbone=True)
    assert parts("accept_head") != parts("accept_head", accept_layout="judge")
    assert parts("sft") != parts("sft", train_on_prompt=True)
