"""The judge at decoding time against training: the same head on the same states, whatever was cached before."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from tests.conftest import build_tokenizer
from tests.drafters.test_drafters import KINDS, lively

from luthier.core.errors import ModelError
from luthier.core.types import Example
from luthier.data.layout import collate
from luthier.engines.acceptance import AcceptJudge, Facts
from luthier.engines.target import Cached, Pass, Target
from luthier.heads.accept import AcceptHead as Head
from luthier.model.policy import PolicySetup
from luthier.objectives.accept_head import AcceptHead, AcceptHeadConfig, separator

LAYOUTS = ("sep", "hybrid", "judge")
TOKENIZER = build_tokenizer()
SEP = separator(TOKENIZER)


def strict_head(seed=1):
    """A head whose probabilities lie far apart, in float64."""
    torch.manual_seed(seed)
    head = Head(32).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter))
    return head


def facts(layout, **changes):
    return Facts.read({"head": "accept", "layout": layout, "sep_id": SEP, "frozen": True} | changes, "here")


def trained(model, head, layout, context, draft, verifier):
    """{index: probability} of all mismatches as training computes them: the row alone, one pass, no cache."""
    wrong = [i for i, (mine, theirs) in enumerate(zip(draft, verifier)) if mine != theirs]
    if not wrong:
        return {}
    known = {"req_id": "1", "place": "1", "draft": draft, "verifier": verifier, "unscored": None}
    known |= {"mismatches": [{"index": i, "target": 0.5} for i in wrong], "context_ids": context}
    stage = AcceptHead(AcceptHeadConfig(accept_layout=layout))
    renderer = SimpleNamespace(tokenizer=TOKENIZER)
    (encoded,) = stage.encode(Example((), (), extra=known), renderer, cutoff_len=4096)
    batch = collate([(encoded, "row")], layout="shared", pad_id=3)
    setup = PolicySetup(model, head=head)
    with torch.no_grad():
        verdict = setup.bind().verdict_at_tokens(batch)
    setup.close()
    return dict(zip(wrong, torch.sigmoid(verdict[:, 0]).tolist()))


def rounds(seed, count=6):
    """Contexts that grow past any window and now and then change course; drafts that are right here and there."""
    rng, context = random.Random(seed), [30, 31, 32]
    for _ in range(count):
        context = context[: len(context) - rng.choice([0, 0, 2])]
        context = [*context, *(rng.randrange(6, 380) for _ in range(rng.randint(2, 9)))]
        draft = [rng.randrange(6, 380) for _ in range(rng.randint(1, 5))]
        verifier = [token if rng.random() < 0.4 else rng.randrange(6, 380) for token in draft]
        yield context, draft, [*verifier, rng.randrange(6, 380)]


@pytest.mark.parametrize("own", [True, False], ids=["own cache", "the target's pass"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_trained_is_what_judges(kind, layout, own):
    model, head = lively(kind), strict_head()
    target = Target(lively(kind))
    scorer = Cached(lively(kind)) if own else target if layout != "judge" else None
    judge, judged = AcceptJudge(head, facts(layout), threshold=0.5, scorer=scorer), 0
    for context, draft, verifier in rounds(kind):
        seen = target.verify(context, draft)
        found = judge.probabilities(context, draft, verifier, seen)
        for index, probability in trained(model, head, layout, context, draft, verifier).items():
            assert found[index] == pytest.approx(probability, abs=1e-9)
            judged += 1
        # A scorer in the target's own cache must leave it as it was.
        torch.testing.assert_close(target.verify(context, draft).logits, seen.logits)
    assert judged > 5


def test_what_saw_both_ways_is_not_remembered():
    """The text may go on with the very tokens of the last suffix, separator first."""
    target, context, draft, verifier = Target(lively("qwen3")), [30, 31, 32], [40, 41], [50, 51, 52]
    judge = AcceptJudge(strict_head(), facts("hybrid"), threshold=0.5, scorer=target)
    nothing = Pass(torch.zeros(0), torch.zeros(0))
    first = judge.probabilities(context, draft, verifier, nothing)
    longer = [*context, SEP, *draft, SEP]
    torch.testing.assert_close(target.verify(longer, [50]).logits, Target(lively("qwen3")).verify(longer, [50]).logits)
    # Nor is what was seen one way taken for what sees both ways.
    assert judge.probabilities(context, draft, verifier, nothing) == pytest.approx(first, abs=1e-9)


def test_eager_attention_gets_the_hybrid_mask_too():
    model, head = lively("gemma3"), strict_head()
    eager = lively("gemma3")
    eager.set_attn_implementation("eager")
    judge = AcceptJudge(head, facts("hybrid"), threshold=0.5, scorer=Cached(eager))
    for context, draft, verifier in rounds(3):
        found = judge.probabilities(context, draft, verifier, Pass(torch.zeros(0), torch.zeros(0)))
        expected = trained(model, head, "hybrid", context, draft, verifier)
        assert {i: found[i] for i in expected} == pytest.approx(expected, abs=1e-5), "its softmax is in float32"


def test_attention_that_takes_no_mask_is_refused_for_hybrid():
    model = lively()
    judge = AcceptJudge(strict_head(), facts("hybrid"), threshold=0.5, scorer=Cached(model))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="flash_attention_2.*flash_attn: sdpa"):
        judge.probabilities([5, 6], [7], [8, 9], Pass(torch.zeros(0), torch.zeros(0)))


def test_a_draft_without_mismatch_costs_no_pass():
    scorer = Cached(lively())
    judge = AcceptJudge(strict_head(), facts("sep"), threshold=0.5, scorer=scorer)
    assert judge.probabilities([5, 6], [7, 8], [7, 8, 9], Pass(torch.zeros(0), torch.zeros(0))) == []
    assert scorer.passes == 0


def test_only_what_can_matter_is_computed():
    scorer, nothing = Cached(lively()), Pass(torch.zeros(0), torch.zeros(0))
    judge = AcceptJudge(strict_head(), facts("sep"), threshold=0.5, scorer=scorer)
    judge.probabilities([5, 6, 7], [8, 9, 10, 11], [1, 2, 10, 11, 12], nothing)
    assert scorer.computed == 3 + 1 + 2, "context, separator and the draft up to its last mismatch"
    judge.probabilities([5, 6, 7, 8, 1], [9], [2, 3], nothing)
    assert scorer.computed == 6 + 2 + 1 + 1, "two more tokens of context, separator and draft"


@pytest.mark.parametrize(("layout", "most"), [("sep", 2 + 1 + 1), ("hybrid", 2 + 1 + 1 + 1 + 2), ("judge", 2 + 1)])
def test_nothing_is_judged_beyond_what_the_scorer_can_take(layout, most):
    seen = Pass(torch.zeros(0), torch.zeros(0))
    for context, count in ((most, 1), (most - 1, 0)):
        judge = AcceptJudge(strict_head(), facts(layout), threshold=0.5, scorer=Cached(lively()), context=context)
        assert len(judge.probabilities([5, 6], [7], [8, 9], seen)) == count


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"head": "value"}, "head 'value'"),
        ({"layout": "sepp"}, "layout 'sepp'.* judge, sep, hybrid"),
        ({"sep_id": None}, "no separator"),
    ],
)
def test_facts_that_do_not_say_enough(changes, complaint):
    with pytest.raises(ModelError, match=complaint):
        Facts.read({"head": "accept", "layout": "sep", "sep_id": 5} | changes, "here")


def test_facts_that_are_left_out():
    found = Facts.read({"head": "accept", "layout": "judge"}, "here")
    assert (found.threshold, found.frozen, found.sep_id) == (0.5, False, None)
