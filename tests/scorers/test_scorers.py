"""Scores of mismatches, against tables of what the model says and formulas written out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from luthier.core import registry
from luthier.core.errors import ConfigError
from luthier.engines.hf import Engine
from luthier.engines.rounds import Mismatch, Round
from luthier.engines.sampling import GenerateConfig
from luthier.scorers import kl, prob, rerun
from luthier.scorers._final import final_answer, meets, stays_right
from luthier.scorers._spot import Request, Spot, Tools, scorer_in
from tests.scorers.chains import chain_model, token

STOP = "<|im_end|>"
OWN = {"a": "b", "b": "c", "c": "7", "7": STOP}
OTHER_WAYS = {"x": "y", "y": "7", "p": "q", "q": "8", "8": STOP, "s": ["7", "8"], "o": "o", STOP: "7"}
"""x leads to 7, p to 8, s to either, o nowhere; after the end nothing counts."""


@pytest.fixture
def tools(tokenizer, tmp_path):
    engine = Engine(chain_model(tokenizer, OWN | OTHER_WAYS), tokenizer)
    sampling = GenerateConfig(do_sample=False, max_new_tokens=12, temperature=1.0, top_p=1.0, top_k=2)
    return Tools(engine, sampling, (token(tokenizer, STOP),), 42, tmp_path)


def spots(tools, drafts, *, answer="abc7", prompt="Q", reference=None, cut=1, every=False):
    """One spot a draft: the first token that the table would not have said."""
    ids = [[token(tools.engine.tokenizer, one) for one in text] for text in (prompt, answer)]
    request = Request(3, "Q", ids[0], [*ids[1], tools.stop_ids[0]], reference)
    found = []
    for text in drafts:
        draft = [token(tools.engine.tokenizer, one) for one in ([STOP] if text == STOP else text)]
        own = request.answer_ids[cut : cut + len(draft)]
        wrong = [i for i, (d, a) in enumerate(zip(draft, own)) if d != a]
        one = Round(cut, draft, [*own, 0], [])
        found += (Spot(request, one, Mismatch(i, 0.7, 0.25, 3)) for i in (wrong if every else wrong[:1]))
    return found


def score(tools, found, **keys):
    return rerun.Rerun(rerun.Config(**keys), tools).score(found)


def test_what_is_kept_is_gone_on_with_to_the_final_answer(tools):
    drafts = ["x", "p", "bx", "bp", "bcx", "bc8", STOP, "o"]
    # a x y 7 | a p q 8 | a b x y 7 | a b p q 8 | a b c x y 7 | a b c 8 | a | a o o o ... up to the limit
    assert score(tools, spots(tools, drafts)) == [1, 0, 1, 0, 1, 0, 0, 0]


def test_only_the_mismatch_is_kept_and_not_what_the_draft_says_after_it(tools):
    assert score(tools, spots(tools, ["xp8", "pxy"])) == [1, 0]


def test_later_mismatches_keep_the_draft_before_them(tools):
    # own: b c 7. Draft x y p: kept x -> 7, x y -> 7, x y p -> 8.
    assert score(tools, spots(tools, ["xyp"], every=True)) == [1, 1, 0]


def test_the_row_says_what_is_right_and_the_targets_own_miss_counts_too(tools):
    assert score(tools, spots(tools, ["x", "p", "o"], reference="so it is 7")) == [1, 0, 0]
    # The target says 7 where 8 is right: 8 is right, 7 loses nothing, no answer loses something.
    assert score(tools, spots(tools, ["x", "p", "o"], reference="8")) == [1, 1, 0]


def test_an_answer_that_comes_to_nothing_cannot_be_scored(tools):
    assert all(map(math.isnan, score(tools, spots(tools, ["x", "p"], answer="abc"))))
    assert score(tools, spots(tools, ["x", "p"], answer="abc", reference="8")) == [0, 1]
    assert score(tools, []) == []


def test_a_pattern_says_where_the_final_answer_stands(tools):
    # After "c" or "q": a b c 7 and a p q 8 come to "c7" and "q8", a x y 7 to nothing.
    found = spots(tools, ["x", "p", "bx"])
    assert score(tools, found, answer_pattern="[cq].") == [0, 0, 0]
    assert score(tools, found, answer_pattern="^(a)") == [1, 1, 1]


def test_answers_end_where_plain_decoding_would_end_them(tools):
    short = replace(tools, sampling=replace(tools.sampling, max_new_tokens=4))
    # Four tokens: a b c 7 fits, a x y 7 fits, a b x y does not come to its 7.
    assert score(short, spots(tools, ["x", "bx", "bcx"])) == [1, 0, 0]


def test_with_samples_the_score_is_the_share_that_stays_right(tools):
    found = spots(tools, ["s", "x", "p"])
    coin, seven, eight = score(tools, found, collect_samples=40)
    assert 0.2 < coin < 0.8 and coin * 40 == pytest.approx(round(coin * 40))
    assert seven > 0.9 and eight < 0.1  # top_k 2 lets in one token of exp(-40) the weight
    assert score(tools, found[:1], collect_samples=40) == [coin]
    others = {score(replace(tools, seed=seed), found[:1], collect_samples=40)[0] for seed in range(5)}
    assert len(others) > 1


def test_kl_and_prob_are_what_the_target_said(tools):
    (spot,) = spots(tools, ["x"])
    assert prob.Prob(prob.Config(), tools).score([spot]) == [0.25]
    for tau in (0.5, 1.0, 3.0):
        assert kl.Kl(kl.Config(collect_kl_tau=tau), tools).score([spot]) == [pytest.approx(2.718281828 ** (-0.7 / tau))]


@pytest.mark.parametrize(
    ("text", "pattern", "final"),
    [
        ("first 3, then 1,234.50.", None, "1234.5"),
        ("so x = -7", None, "-7"),
        ("10-5", None, "5"),
        ("The sum is $1,000.", None, "1000"),
        (r"thus \boxed{\frac{1}{2}} since 4 > 3", None, r"\frac{1}{2}"),
        (r"\boxed{7.0} or \boxed{ 42 }.", None, "42"),
        (r"\boxed{7 and 8", None, "8"),
        ("Paris", None, None),
        ("ANSWER: Yes. answer: No.", r"(?i)answer: (\w+)", "no"),
        ("the 5 of 9", r"\d", "9"),
        ("nothing", r"answer: (\w+)", None),
        ("7 %", r".*%", "7"),
    ],
)  # fmt: skip
def test_the_final_answer_of_a_text(text, pattern, final):
    import re

    assert final_answer(text, re.compile(pattern) if pattern else None) == final


def test_a_reference_of_words_is_looked_for_as_words():
    paris = meets("Paris")
    assert paris("It is  PARIS, since 987.") and not paris("Parisian") and not paris("Rome")
    assert meets("42")("#### 42.0") and not meets("42")("421")
    assert stays_right(None, "Rome") is None
    right = stays_right("Paris", "Rome, the city of 7 hills")
    assert right("Paris") and right("7") and not right("Lyon")


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        (kl.Config, {"collect_kl_tau": 0.0}),
        (kl.Config, {"collect_kl_tau": math.inf}),
        (rerun.Config, {"collect_samples": 0}),
        (rerun.Config, {"answer_pattern": "(a"}),
    ],
)
def test_keys_that_make_no_sense_are_refused(config, keys):
    with pytest.raises(ConfigError, match=next(iter(keys))):
        config(**keys)


def test_every_scorer_is_found_by_its_name():
    assert registry.names("scorers") == ["kl", "llm", "prob", "rerun"]
    for name in registry.names("scorers"):
        assert scorer_in(registry.find("scorers", name)).__module__ == f"luthier.scorers.{name}"
    with pytest.raises(ConfigError, match="exactly one Scorer, and defines 0"):
        scorer_in(registry.find("drafters", "prompt_lookup"))
