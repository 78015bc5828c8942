"""Speculation against transformers' own generate, and against its definition written out by hand."""

from __future__ import annotations

import random

import pytest
import torch
from tests.drafters.test_drafters import KINDS, lively
from tests.engines.test_acceptance import LAYOUTS, facts, strict_head

from luthier.drafters._greedy import Greedy
from luthier.drafters.early_exit import first_layers
from luthier.drafters.prompt_lookup import PromptLookup
from luthier.engines.acceptance import AcceptJudge
from luthier.engines.speculate import Speculator, Tally
from luthier.engines.target import Cached, Draft, Target

PROMPTS = [[7, 8, 9], [40, 41, 42] * 6 + [11, 12], list(range(60, 85)), [30]]
DRAFTERS = {
    "prompt_lookup": lambda model: PromptLookup(3),
    "early_exit": lambda model: Greedy(Cached(first_layers(model, 1)), 400),
    "draft_model": lambda model: Greedy(Cached(lively(seed=9, num_hidden_layers=1)), 400),
}


class Stranger:
    """Drafts tokens at random, of which the target would say next to none."""

    def __init__(self, seed=0):
        self._rng = random.Random(seed)

    def propose(self, ids, count):
        return Draft([self._rng.randrange(6, 400) for _ in range(self._rng.randint(0, count))])

    def forget(self):
        pass


def generated(model, prompt, new_tokens, stops=(), penalty=1.0):
    """The answer by transformers' generate."""
    import transformers

    model.generation_config.eos_token_id = None  # else it would come in where none is given
    config = transformers.GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        repetition_penalty=penalty,
        eos_token_id=list(stops) or None,
        pad_token_id=3,
    )
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(), generation_config=config
        )
    return out[0, len(prompt) :].tolist()


def answer(speculator, prompt, room, stops=(), penalty=1.0):
    tally, ids = Tally(), []
    for done in speculator.rounds(prompt, room, stops, repetition_penalty=penalty):
        tally.add(done)
        ids += done.ids
    assert tally.tokens == len(ids)
    return ids, tally


def judge_for(layout, target, threshold, frozen=True):
    scorer = None if layout == "judge" and frozen else target if frozen else Cached(target.model)
    return AcceptJudge(strict_head(), facts(layout), threshold=threshold, scorer=scorer)


@pytest.mark.parametrize(
    ("drafter", "penalty"), [*((name, 1.0) for name in DRAFTERS), ("stranger", 1.0), ("early_exit", 1.7)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_judge_it_is_plain_greedy_decoding(kind, drafter, penalty):
    """All texts grow far beyond the window of the sliding layers."""
    model = lively(kind)
    drafts = Stranger() if drafter == "stranger" else DRAFTERS[drafter](model)
    speculator = Speculator(Target(model), drafts, draft_tokens=4)
    for prompt in PROMPTS:
        expected = generated(model, prompt, 17, penalty=penalty)
        assert answer(speculator, prompt, 17, penalty=penalty)[0] == expected
        stop = expected[9]
        until = expected[: expected.index(stop) + 1]
        assert answer(speculator, prompt, 17, [stop, 399], penalty=penalty)[0] == until


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_threshold_above_one_is_plain_greedy_decoding(kind, layout):
    model = lively(kind)
    target = Target(model)
    judge = judge_for(layout, target, 1.01, frozen=layout == "judge")
    speculator = Speculator(target, Stranger(), judge)
    for prompt in PROMPTS:
        assert answer(speculator, prompt, 14)[0] == generated(model, prompt, 14)
    assert judge.scorer is None or judge.scorer.passes == 0, "what cannot be kept is not judged"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("drafter", ["early_exit", "draft_model"])
def test_a_threshold_below_zero_keeps_every_draft_token(layout, drafter):
    model = lively("mistral")
    target = Target(model)
    speculator = Speculator(target, DRAFTERS[drafter](model), judge_for(layout, target, -0.01), draft_tokens=3)
    alone, plain = DRAFTERS[drafter](model), Target(lively("mistral"))
    for prompt in PROMPTS:
        expected = []
        while len(expected) < 15:
            expected += alone.propose([*prompt, *expected], min(3, 14 - len(expected))).ids
            expected.append(int(plain.verify([*prompt, *expected], []).logits.argmax()))
        found, tally = answer(speculator, prompt, 15)
        assert found == expected
        assert tally.kept == tally.drafted and tally.passes == 4, "four rounds: 4 + 4 + 4 + 3"


def test_a_draft_that_is_the_target_is_kept_whole():
    model = lively("gemma3")
    speculator = Speculator(Target(model), Greedy(Cached(lively("gemma3")), 400), draft_tokens=4)
    for prompt in PROMPTS:
        found, tally = answer(speculator, prompt, 16)
        assert found == generated(model, prompt, 16)
        assert (tally.kept, tally.drafted, tally.judged) == (12, 12, 0)
        assert (tally.passes, tally.tokens_per_pass) == (4, 4.0), "five, five, five, and the last one"


@pytest.mark.parametrize("frozen", [True, False], ids=["states of the target", "a scorer of its own"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_the_rule_written_out_by_hand(kind, layout, frozen):
    """One round after another, each by plain passes over everything, with the training code's view of the head."""
    from tests.engines.test_acceptance import trained

    plain, head, threshold, stops = lively(kind), strict_head(), 0.55, {77}
    target = Target(lively(kind))
    drafter = DRAFTERS["early_exit"](target.model)
    speculator = Speculator(target, drafter, judge_for(layout, target, threshold, frozen), draft_tokens=4)
    drafts, judged = DRAFTERS["early_exit"](lively(kind)), 0
    for prompt in PROMPTS[1:3]:
        expected = []
        while len(expected) < 15 and not stops & set(expected):
            ids = [*prompt, *expected]
            draft = drafts.propose(ids, min(4, 14 - len(expected))).ids
            with torch.no_grad():
                logits = plain(torch.tensor([[*ids, *draft]]), use_cache=False).logits[0, len(ids) - 1 :]
            says = logits.argmax(-1).tolist()
            good = trained(plain, head, layout, ids, draft, says)
            kept = 0
            while kept < len(draft) and (draft[kept] == says[kept] or good[kept] >= threshold):
                judged += draft[kept] != says[kept]
                kept += 1
            for token in [*draft[:kept], says[kept]]:
                expected.append(token)
                if token in stops:
                    break
        assert answer(speculator, prompt, 15, stops)[0] == expected
    assert judged, "the judge kept something that plain decoding would not say"


def test_a_stop_token_in_a_draft_that_is_kept_ends_the_answer():
    class Script:
        def propose(self, ids, count):
            return Draft([50, 51, 52, 53][:count])

        def forget(self):
            pass

    target = Target(lively())
    speculator = Speculator(target, Script(), judge_for("judge", target, -1), draft_tokens=4)
    found, tally = answer(speculator, [7, 8, 9], 30, [52])
    assert found == [50, 51, 52]
    assert (tally.passes, tally.drafted, tally.kept) == (1, 3, 3), "what comes after a stop is not even verified"


@pytest.mark.parametrize("room", [1, 2, 5, 6, 7])
def test_an_answer_has_room_tokens_exactly(room):
    model = lively()
    speculator = Speculator(Target(model), Greedy(Cached(lively()), 400), draft_tokens=4)
    assert answer(speculator, [7, 8, 9], room)[0] == generated(model, [7, 8, 9], room)


def test_a_text_may_fill_the_context_to_its_last_token():
    """Absolute positions: one token too many is an error of indexing."""
    model = lively("gpt2", n_positions=24)
    target = Target(model)
    judge = AcceptJudge(strict_head(), facts("hybrid"), threshold=0.5, scorer=target, context=24)
    found, _ = answer(Speculator(target, Greedy(Cached(model), 400), judge), list(range(40, 52)), 12)
    assert len(found) == 12


def test_after_forgetting_everything_is_computed_again():
    target = Target(lively())
    drafter = DRAFTERS["early_exit"](target.model)
    speculator = Speculator(target, drafter, judge_for("sep", target, 0.5, frozen=False))
    first, _ = answer(speculator, PROMPTS[2], 8)
    seen = [part.computed for part in (target, drafter.model, speculator.judge.scorer)]
    speculator.forget()
    assert answer(speculator, PROMPTS[2], 8)[0] == first
    assert [part.computed for part in (target, drafter.model, speculator.judge.scorer)] == [2 * n for n in seen]
