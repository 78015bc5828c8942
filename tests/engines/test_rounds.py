"""Rounds along an answer, against full forward passes without any cache and probabilities written out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from tests.conftest import build_model

from luthier.engines.rounds import Rules, walk
from luthier.engines.target import Draft, Target

PROMPT = [11, 52, 103, 24, 75]
STOP = 5
LONG = 24


def lively(kind="llama", seed=0):
    model = build_model(kind, dtype=torch.float64, seed=seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@torch.no_grad()
def plain(model, ids):
    """Logits after some tokens, all computed anew."""
    return model(torch.tensor([list(ids)]), use_cache=False).logits[0, -1]


def greedy(model, count):
    ids = list(PROMPT)
    while len(ids) < len(PROMPT) + count:
        ids.append(int(plain(model, ids).argmax()))
    return ids[len(PROMPT) :]


@dataclass
class Scripted:
    """Drafts the true answer with every third token of it changed; nothing at some places."""

    answer: list[int]
    empty: tuple[int, ...] = ()
    logits: bool = False
    asked: list[int] = field(default_factory=list)

    def propose(self, ids, count):
        at = len(ids) - len(PROMPT)
        assert count > 0
        assert list(ids) == [*PROMPT, *self.answer[:at]]
        self.asked.append(at)
        if at in self.empty:
            return Draft()
        own = self.answer[at : at + count]
        draft = [token if (at + i) % 3 else (token + 7) % 400 for i, token in enumerate(own)]
        rows = torch.randn(len(draft), 400, generator=torch.Generator().manual_seed(at)) * 3
        rows[:, -9:] = -torch.inf
        return Draft(draft, rows if self.logits else None)


def rules(**changes):
    return Rules(**{"draft_tokens": 4, "stop_ids": (STOP,), "context": 512, "every": True} | changes)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("logits", [False, True])
def test_what_the_target_says_to_a_draft(kind, logits):
    model = lively(kind)
    answer = greedy(model, LONG)
    drafter = Scripted(answer, logits=logits)
    found = walk(Target(model), drafter, PROMPT, answer, rules())
    seen = 0
    for one in found.rounds:
        context = [*PROMPT, *answer[: one.cut]]
        rows = [plain(model, [*context, *one.draft[:i]]) for i in range(len(one.draft) + 1)]
        assert one.verifier == [int(row.argmax()) for row in rows]
        proposed = Scripted(answer, logits=logits).propose(context, 4)
        assert one.draft == proposed.ids
        assert [m.index for m in one.mismatches] == [i for i, d in enumerate(one.draft) if d != one.verifier[i]]
        for mismatch in one.mismatches:
            p = rows[mismatch.index].softmax(-1).tolist()
            token = one.draft[mismatch.index]
            assert mismatch.rank == sorted(p, reverse=True).index(p[token]) + 1
            assert mismatch.prob == pytest.approx(p[token] / max(p), rel=1e-6)
            if logits:
                q = proposed.logits[mismatch.index].double().softmax(-1).tolist()
                kl = sum(b * math.log(b / a) for a, b in zip(p, q) if b > 0)
            else:
                kl = -math.log(p[token])
            assert mismatch.kl == pytest.approx(kl, rel=1e-6)
            seen += 1
    assert seen > 6 and found.empty == 0


def test_cuts_are_those_of_speculative_decoding():
    model = lively()
    answer = greedy(model, LONG)
    target, drafter = Target(model), Scripted(answer, empty=(2, 7, 8))
    found = walk(target, drafter, PROMPT, answer, rules(every=False))
    committed, cuts, empty = list(PROMPT), [], 0
    while len(committed) < len(PROMPT) + LONG:  # decoding itself, which does not know the answer
        at = len(committed) - len(PROMPT)
        draft = [] if at in (2, 7, 8) else Scripted(answer).propose(committed, 4).ids
        cuts, empty = ([*cuts, at], empty) if draft else (cuts, empty + 1)
        for token in [*draft, None]:
            own = int(plain(model, committed).argmax())
            committed.append(own)
            if token != own:
                break
    assert committed[len(PROMPT) :][:LONG] == answer
    assert ([one.cut for one in found.rounds], found.empty) == (cuts, empty)
    assert 1 <= empty < len(cuts) and target.passes == len(cuts)
    for one in found.rounds:
        wrong = [i for i, d in enumerate(one.draft) if d != one.verifier[i]]
        assert [m.index for m in one.mismatches] == wrong[:1]


def test_a_stride_cuts_evenly():
    model = lively()
    answer = greedy(model, 10)
    found = walk(Target(model), Scripted(answer, empty=(4,)), PROMPT, answer, rules(stride=2))
    assert [one.cut for one in found.rounds] == [0, 2, 6, 8] and found.empty == 1


def test_a_draft_ends_with_its_stop_token_and_a_walk_with_the_answer():
    class Stops:
        def propose(self, ids, count):
            return Draft([9, STOP, 9, 9][:count])

    model = lively()
    answer = [*greedy(model, 3), STOP]
    found = walk(Target(model), Stops(), PROMPT, answer, rules())
    assert [one.draft for one in found.rounds] == [[9, STOP]] * len(found.rounds)
    assert all(len(one.verifier) == 3 for one in found.rounds)
    assert [one.cut for one in found.rounds] == [0, 1, 2, 3]


def test_a_draft_that_is_the_answer_is_walked_in_one_round_a_draft():
    class Knows:
        def propose(self, ids, count):
            return Draft(answer[len(ids) - len(PROMPT) :][:count])

    model = lively()
    answer = greedy(model, LONG)
    found = walk(Target(model), Knows(), PROMPT, answer, rules())
    assert [one.cut for one in found.rounds] == [0, 5, 10, 15, 20]
    assert [m for one in found.rounds for m in one.mismatches] == []


def test_drafts_stay_within_what_the_model_can_take():
    model = lively()
    answer = greedy(model, 8)
    found = walk(Target(model), Scripted(answer), PROMPT, answer, rules(context=len(PROMPT) + 6, stride=1))
    assert [(one.cut, len(one.draft)) for one in found.rounds] == [(0, 4), (1, 4), (2, 4), (3, 3), (4, 2), (5, 1)]
    assert found.empty == 2
