"""KTO against TRL's own loss code and by hand; its KL depends on the data alone."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
import torch
from tests.conftest import build_model
from tests.exact.conftest import in_double
from tests.exact.runs import furthest, trainer_for, weights
from tests.objectives.plain import KTOTrainer, padded, token_logps, trl_loss

from luthier.core.batch import total_units
from luthier.core.errors import ConfigError
from luthier.core.types import ASIDE, Answer, Encoded, Example, Message, Path
from luthier.data.layout import collate
from luthier.data.source import BadRow
from luthier.model.policy import PolicySetup
from luthier.model.reference import FrozenModel
from luthier.objectives.kto import Kto, KtoConfig
from luthier.train import by_hand


def path(prompt, reply, score=math.nan, name="response") -> Path:
    return Path([*prompt, *reply], [0.0] * len(prompt) + [1.0] * len(reply), name, score)


def votes(scores, seed=0) -> list[tuple[Encoded, str]]:
    rng = random.Random(seed)
    items = []
    for number, score in enumerate(scores):
        prompt = [rng.randrange(7, 400) for _ in range(rng.randint(2, 6))]
        reply = [rng.randrange(7, 400) for _ in range(rng.randint(1, 6))]
        items.append((Encoded((path(prompt, reply, score),)), f"row {number}"))
    return items


VOTES = votes([1.0, -1.0, 1.0, 1.0, -1.0])


@pytest.fixture(scope="module")
def pair_of_models():
    """The second is the reference; this way round the KL is above 0."""
    torch.set_default_dtype(torch.float64)
    yield tuple(in_double(build_model("llama", dtype=torch.float64, seed=s)).eval() for s in (9, 0))
    torch.set_default_dtype(torch.float32)


def ask(objective, models, items, *, layout="shared", cuts=None):
    """(loss, logs) of one step cut into micro-batches."""
    setup = PolicySetup(models[0])
    setup.reference = FrozenModel(models[1], setup)
    try:
        items, batches, start = [objective.complete(i, items) for i in range(len(items))], [], 0
        for size in cuts or [len(items)]:
            batches.append(collate(items[start : start + size], layout=layout, pad_id=3))
            start += size
        totals = total_units(batches) | by_hand.survey(setup.bind, objective, batches)
        loss, logs = 0.0, {}
        for batch in batches:
            part, more = objective.loss(setup.bind(), batch.with_totals(totals))
            loss = loss + part
            logs = {name: logs.get(name, 0.0) + value.item() for name, value in more.items()}
        return loss, logs
    finally:
        for model in models:  # the reference was frozen, and another test may train it
            model.requires_grad_(True)
        setup.close()
        setup.reference.own.close()


def mismatched(items) -> list[Path]:
    """Each prompt with the answer of the next example, the last with the first's."""
    parts = []
    for encoded, _ in items:
        own = encoded.paths[0]
        start = own.weights.index(1.0)
        parts.append((own.ids[:start], own.ids[start:]))
    chosen = []
    for n, (prompt, reply) in enumerate(parts):
        after = parts[(n + 1) % len(parts)]
        room = max(len(prompt) + len(reply), len(after[0]) + len(after[1])) - len(prompt)
        chosen.append(path(prompt, after[1][:room]))
    return chosen


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("cuts", [[5], [2, 2, 1], [1, 4]])
def test_loss_and_metrics_are_trls_on_the_whole_step(pair_of_models, layout, cuts):
    inputs = padded([e.paths[0] for e, _ in VOTES])
    inputs |= {f"KL_{name}": value for name, value in padded(mismatched(VOTES)).items()}
    inputs["label"] = torch.tensor([e.paths[0].score > 0 for e, _ in VOTES])
    settings = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5, "loss_type": "kto"}
    expected, metrics = trl_loss(KTOTrainer, *pair_of_models, inputs, calculate_KL=True, **settings)
    objective = Kto(KtoConfig(pref_beta=0.3, kto_chosen_weight=1.5, kto_rejected_weight=0.5))
    found, logs = ask(objective, pair_of_models, VOTES, layout=layout, cuts=cuts)
    assert metrics["kl"] > 0.05, "otherwise the clamp hides everything"
    assert found.item() == pytest.approx(expected.item(), abs=1e-7)
    assert logs == pytest.approx({name: metrics[name] for name in logs}, abs=1e-7)
    assert {"kl", "rewards/chosen", "rewards/margins", "logps/rejected"} <= set(logs)
    ours, theirs = (torch.autograd.grad(x, pair_of_models[0].parameters()) for x in (found, expected))
    assert max(float((a - b).abs().max()) for a, b in zip(ours, theirs)) < 1e-6


def test_a_negative_kl_counts_as_none(pair_of_models):
    models = pair_of_models[::-1]
    with torch.no_grad():
        ratios = [(token_logps(models[0], p) - token_logps(models[1], p)).sum().item() for p in mismatched(VOTES)]
    assert sum(ratios) < 0
    assert ask(Kto(), models, VOTES)[1]["kl"] == 0.0


def test_before_the_first_step_the_kl_is_nothing_and_the_loss_a_half(pair_of_models):
    same = (pair_of_models[0], in_double(build_model("llama", dtype=torch.float64, seed=9)).eval())
    loss, logs = ask(Kto(), same, VOTES)
    assert loss.item() == pytest.approx(0.5, abs=1e-12)
    for name in ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert logs[name] == pytest.approx(0.0, abs=1e-12)


class Told:
    """A policy that is told what to answer, about answers and about what lies aside."""

    def __init__(self, logps, reference, aside_logps, aside_reference):
        self._said = {True: (logps, reference), False: (aside_logps, aside_reference)}

    def logps(self, batch):
        return torch.tensor(self._said[batch.aside is not None][0], dtype=torch.float64)

    def reference(self, batch):
        return torch.tensor(self._said[batch.aside is not None][1], dtype=torch.float64)


def test_two_votes_by_hand():
    # Liked: tokens of -1, -1 (reference -2, -1): ratio 1. Disliked: -3 (reference -1): ratio -2.
    # Mismatched: 7 8 with 30, ratio 1; 9 with 20 21, ratios 0.5 and 0.5. KL = (1 + 1) / 2 = 1.
    items = [
        (Encoded((path([7, 8], [20, 21], 1.0),)), ""),
        (Encoded((path([9], [30], -1.0),)), ""),
    ]
    told = Told([-1.0, -1, -3], [-2.0, -1, -1], [-1.0, -1.5, -1], [-2.0, -2, -1.5])
    objective = Kto(KtoConfig(pref_beta=0.5, kto_chosen_weight=2.0, kto_rejected_weight=3.0, pref_ftx=0.25))
    batch = collate([objective.complete(i, items) for i in (0, 1)], layout="padded", pad_id=3)
    totals = batch.units() | {name: float(value) for name, value in objective.survey(told, batch).items()}
    loss, logs = objective.loss(told, batch.with_totals(totals))

    def s(x):
        return 1 / (1 + math.exp(-x))

    # liked: 2 (1 - s(0.5 (1 - 1))); disliked: 3 (1 - s(0.5 (1 + 2))); SFT on the liked answer: 1 per token
    assert loss.item() == pytest.approx((2 * 0.5 + 3 * (1 - s(1.5))) / 2 + 0.25 * 1.0, abs=1e-12)
    expected = {"kl": 1.0, "rewards/chosen": 0.5, "rewards/rejected": -1.0, "rewards/margins": 1.5}
    expected |= {"logps/chosen": -2.0, "logps/rejected": -3.0, "nll_loss": 1.0}
    assert {name: float(value) for name, value in logs.items()} == pytest.approx(expected)
    assert objective.record(told, batch)["reward"].tolist() == pytest.approx([0.5, -1.0])


def test_the_mismatched_pair_is_this_prompt_with_the_next_answer():
    items = [(Encoded((path([1, 2], [3], 1.0),)), "a"), (Encoded((path([4], [5, 6, 7, 8], -1.0),)), "b")]
    first, second = (Kto().complete(i, items)[0].paths for i in (0, 1))
    assert first[0] == items[0][0].paths[0]
    assert (first[1].ids, first[1].weights) == ([1, 2, 5, 6, 7], [0.0, 0.0, 1.0, 1.0, 1.0])  # 5 tokens at most
    assert (second[1].ids, second[1].weights) == ([4, 3], [0.0, 1.0])
    assert first[1].name.startswith(ASIDE)
    alone = Kto().complete(0, items[:1])[0].paths
    assert alone[1].ids == alone[0].ids


def test_training_does_not_depend_on_how_a_step_is_cut(tmp_path):
    items = votes([1.0, -1.0] * 6, seed=2)
    whole = trainer_for("kto", tmp_path, items=items, batch=4)
    cut = trainer_for("kto", tmp_path, items=items, batch=1, accumulate=4, layout="padded")
    for trainer in (whole, cut):
        trainer.train()
    assert furthest(weights(whole), weights(cut)) < 2e-7
    kls = [[entry["kl"] for entry in t.state.log_history if "kl" in entry] for t in (whole, cut)]
    assert kls[0] == pytest.approx(kls[1], abs=1e-7)
    evaluated = [trainer_for("kto", tmp_path, items=items, batch=size).evaluate() for size in (1, 5)]
    for name in ("eval_kl", "eval_rewards/chosen", "eval_rewards/rejected", "eval_logps/chosen"):
        assert evaluated[0][name] == pytest.approx(evaluated[1][name], abs=1e-7)


def test_it_learns_from_votes_and_leaves_the_reference_alone(tmp_path):
    trainer = trainer_for("kto", tmp_path, items=votes([1.0, -1.0] * 3), batch=6, num_train_epochs=20, lr=1.0)
    reference = trainer.setup.reference.own.model
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[-1] > margins[0] + 0.3
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())


def test_an_answer_without_a_vote_is_a_bad_row():
    example = Example((Message("user", "?"),), (Answer((Message("assistant", "!"),)),))
    renderer = SimpleNamespace(efficient_eos=False, oneturn=lambda *_, **__: ([1], [2]))
    with pytest.raises(BadRow, match="neither liked nor disliked"):
        Kto().encode(example, renderer, cutoff_len=8)


@pytest.mark.parametrize("key", ["pref_beta", "kto_chosen_weight", "kto_rejected_weight", "pref_ftx"])
def test_keys_out_of_range_are_refused(key):
    with pytest.raises(ConfigError, match=f"{key}: -1.0"):
        Kto(KtoConfig(**{key: -1.0})).start(None)
    Kto().start(None)
