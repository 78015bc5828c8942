"""DPO and its family against TRL's own loss code, hand-computed pairs, and what holds before the first step."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
import torch
from tests.conftest import build_model
from tests.exact.conftest import in_double
from tests.exact.runs import trainer_for, weights
from tests.objectives.plain import Alone, CPOTrainer, DPOTrainer, ORPOTrainer, padded, token_logps, trl_loss

from luthier.core.batch import total_units
from luthier.core.errors import ConfigError
from luthier.core.types import Encoded, Path
from luthier.data.layout import collate
from luthier.model.policy import PolicySetup
from luthier.model.reference import FrozenModel
from luthier.objectives.dpo import KINDS, Dpo, DpoConfig
from luthier.train import by_hand

SMOOTH = {"exo_pair": 0.05, "robust": 0.1}


def dpo(pref_loss="sigmoid", **keys) -> Dpo:
    return Dpo(DpoConfig(pref_loss=pref_loss, **{"dpo_label_smoothing": SMOOTH.get(pref_loss, 0.0)} | keys))


def lists(sizes, seed=0, scores=None) -> list[tuple[Encoded, str]]:
    """Examples with so many answers, of uneven lengths, some of which begin alike."""
    rng = random.Random(seed)
    items = []
    for number, size in enumerate(sizes):
        prompt = [rng.randrange(7, 400) for _ in range(rng.randint(2, 6))]
        stem = [rng.randrange(7, 400) for _ in range(rng.randint(0, 2))]
        paths = []
        for k in range(size):
            reply = stem + [rng.randrange(7, 400) for _ in range(rng.randint(1, 6))]
            score = float(size - k) if scores is None else scores[k]
            paths.append(Path(prompt + reply, [0.0] * len(prompt) + [1.0] * len(reply), f"candidate-{k}", score))
        items.append((Encoded(tuple(paths)), f"row {number}"))
    return items


@pytest.fixture(scope="module")
def pair_of_models():
    torch.set_default_dtype(torch.float64)
    yield tuple(in_double(build_model("llama", dtype=torch.float64, seed=s)).eval() for s in (0, 9))
    torch.set_default_dtype(torch.float32)


def ask(objective, models, items, *, layout="shared", cuts=None):
    """(loss, logs) of one step cut into micro-batches."""
    setup = PolicySetup(models[0])
    if len(models) > 1:
        setup.reference = FrozenModel(models[1], setup)
    try:
        cuts, batches, start = cuts or [len(items)], [], 0
        for size in cuts:
            batches.append(collate(items[start : start + size], layout=layout, pad_id=3))
            start += size
        totals = total_units(batches)
        if objective.surveys:
            totals |= by_hand.survey(setup.bind, objective, batches)
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
        if len(models) > 1:
            setup.reference.own.close()


PAIRS = lists([2, 2, 2, 2, 2])


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("ld_alpha", [None, 0.3])
@pytest.mark.parametrize("pref_loss", ["sigmoid", "hinge", "ipo", "robust", "exo_pair"])
def test_loss_and_metrics_are_trls(pair_of_models, pref_loss, ld_alpha, layout):
    answers = [e.paths for e, _ in PAIRS]
    inputs = padded([p[0] for p in answers] + [p[1] for p in answers])
    settings = {"beta": 0.2, "label_smoothing": SMOOTH.get(pref_loss, 0.0), "ld_alpha": ld_alpha}
    settings |= {"loss_types": [pref_loss], "loss_weights": [1.0], "f_divergence_type": "reverse_kl"}
    expected, metrics = trl_loss(DPOTrainer, *pair_of_models, inputs, **settings)
    found, logs = ask(dpo(pref_loss, pref_beta=0.2, ld_alpha=ld_alpha), pair_of_models, PAIRS, layout=layout)
    assert found.item() == pytest.approx(expected.item(), abs=1e-7)  # TRL makes its epsilon a float32
    assert set(logs) == {name for name in metrics if name.startswith(("rewards/", "logps/"))}
    assert logs == pytest.approx({name: metrics[name] for name in logs}, abs=1e-7)  # its accuracies too
    if layout == "shared":
        ours, theirs = (torch.autograd.grad(x, pair_of_models[0].parameters()) for x in (found, expected))
        assert max(float((a - b).abs().max()) for a, b in zip(ours, theirs)) < 1e-6


def averages(models, items):
    """Log-probs per token of the chosen and the rejected answers."""
    return [torch.stack([token_logps(models[0], e.paths[k]).mean() for e, _ in items]) for k in (0, 1)]


def test_simpo_is_trls(pair_of_models):
    a, b = averages(pair_of_models, PAIRS)
    self = SimpleNamespace(
        beta=2.0, simpo_gamma=1.3, alpha=0.0, loss_type="simpo", label_smoothing=0.0, accelerator=Alone()
    )
    losses, chosen, rejected = CPOTrainer.cpo_loss(self, a, b)
    found, logs = ask(dpo("simpo", pref_beta=2.0, simpo_gamma=1.3), pair_of_models[:1], PAIRS)
    assert found.item() == pytest.approx(losses.mean().item(), abs=1e-9)
    assert logs["rewards/chosen"] == pytest.approx(chosen.mean().item(), abs=1e-9)
    assert logs["logps/rejected"] == pytest.approx(b.mean().item(), abs=1e-9)


def test_orpo_is_trls_odds_ratio_and_the_chosen_answers_cross_entropy(pair_of_models):
    a, b = averages(pair_of_models, PAIRS)
    self = SimpleNamespace(beta=0.4, accelerator=Alone())
    ratio, *_ = ORPOTrainer.odds_ratio_loss(self, a, b)
    found, logs = ask(dpo("orpo", pref_beta=0.4), pair_of_models[:1], PAIRS)
    assert found.item() == pytest.approx((-a - ratio.double()).mean().item(), abs=1e-6)  # TRL computes it in float32
    assert logs["nll_loss"] == pytest.approx(-a.mean().item(), abs=1e-9)


def sums(models, items):
    """log-ratios to the reference of whole answers, [answers] per example, by a loop over everything."""
    return [[(token_logps(models[0], p) - token_logps(models[1], p)).sum().item() for p in e.paths] for e, _ in items]


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("way", [-1, 1], ids=["above", "below"])
@pytest.mark.parametrize("cuts", [[5], [2, 2, 1], [1, 4]])
def test_kto_pair_compares_with_the_means_of_the_whole_step(pair_of_models, cuts, way):
    """Equation 7 of the paper with the KL terms of TRL 0.8, the last that had it: means over the batch, at least 0."""
    models = pair_of_models[::way]
    ratios = sums(models, PAIRS)
    kl = [max(0.0, sum(r[k] for r in ratios) / 5) for k in (0, 1)]
    assert min(kl) > 0.05 if way < 0 else kl == [0.0, 0.0], "once the KL counts, once it is clamped"
    losses = [(1 - s(0.5 * (r[0] - kl[1])), 1 - s(0.5 * (kl[0] - r[1]))) for r in ratios]
    found, _ = ask(dpo("kto_pair", pref_beta=0.5), models, PAIRS, cuts=cuts)
    assert found.item() == pytest.approx(sum(map(sum, losses)) / 10, abs=1e-9)


@pytest.mark.parametrize("cuts", [[5], [2, 2, 1], [1, 4]])
def test_bco_is_mixed_in_and_shifts_by_the_mean_reward_of_the_step(pair_of_models, cuts):
    ratios = sums(pair_of_models, PAIRS)
    delta = 0.1 * sum(a + b for a, b in ratios) / 10
    bco = [-math.log(s(0.1 * a - delta)) - math.log(s(-(0.1 * b - delta))) for a, b in ratios]
    plain = [-math.log(s(0.1 * (a - b))) for a, b in ratios]
    expected = (sum(plain) / 5 + 0.7 * sum(bco) / 5) / 1.7
    found, _ = ask(dpo(pref_bco_weight=0.7), pair_of_models, PAIRS, cuts=cuts)
    assert found.item() == pytest.approx(expected, abs=1e-9)


def test_conservative_dpo_and_the_sft_part(pair_of_models):
    h = [0.1 * (a - b) for a, b in sums(pair_of_models, PAIRS)]
    conservative = sum(-0.8 * math.log(s(x)) - 0.2 * math.log(s(-x)) for x in h) / 5
    nll = -averages(pair_of_models, PAIRS)[0].mean().item()
    found, _ = ask(dpo(dpo_label_smoothing=0.2, pref_ftx=0.5), pair_of_models, PAIRS)
    assert found.item() == pytest.approx(conservative + 0.5 * nll, abs=1e-9)


@pytest.mark.parametrize(
    ("which", "pairs"), [("best", [(0, 1), (0, 2), (0, 3)]), ("all", [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])]
)
@pytest.mark.parametrize("ld_alpha", [None, 0.5])
def test_rankings_give_a_mean_over_their_pairs(pair_of_models, which, pairs, ld_alpha):
    items = lists([4, 2, 3], seed=4)

    def shortened(path, size):
        difference = token_logps(pair_of_models[0], path) - token_logps(pair_of_models[1], path)
        return (difference[:size].sum() + (1.0 if ld_alpha is None else ld_alpha) * difference[size:].sum()).item()

    expected = []
    for encoded, _ in items:
        mine = [(i, j) for i, j in pairs if j < len(encoded.paths)]
        losses = []
        for i, j in mine:
            better, worse = encoded.paths[i], encoded.paths[j]
            size = int(min(sum(better.weights), sum(worse.weights)))
            losses.append(-math.log(s(0.1 * (shortened(better, size) - shortened(worse, size)))))
        expected.append(sum(losses) / len(losses))
    for layout in ("padded", "shared"):
        found, _ = ask(dpo(dpo_pairs=which, ld_alpha=ld_alpha), pair_of_models, items, layout=layout)
        assert found.item() == pytest.approx(sum(expected) / 3, abs=1e-9)


class Told:
    """A policy that is told what to answer."""

    def __init__(self, logps, reference):
        self._logps, self._reference = logps, reference

    def logps(self, batch):
        return torch.tensor(self._logps, dtype=torch.float64)

    def reference(self, batch):
        return torch.tensor(self._reference, dtype=torch.float64)


# Two pairs. Chosen: tokens of -1, -2 (reference -2, -2) and -3 (-2); rejected: -2 (-1) and -1, -1, -1 (-1, -2, -1).
# Log-ratios: chosen 1 and -1, rejected -1 and 1; h = 2 and -2. Lengths 2, 1 and 1, 3.
HAND = Told([-1.0, -2, -2, -3, -1, -1, -1], [-2.0, -2, -1, -2, -1, -2, -1])
A, B = [-1.5, -3.0], [-2.0, -1.0]  # log-probs per token: chosen, rejected


def odds(x):
    return x - math.log(1 - math.exp(x))


@pytest.mark.parametrize(
    ("pref_loss", "keys", "expected"),
    [
        ("sigmoid", {}, (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2),
        ("hinge", {}, (0 + 2) / 2),
        ("ipo", {}, ((1 / 2 + 1 - 1) ** 2 + (-1 - 1 / 3 - 1) ** 2) / 2),
        # KL of the chosen and of the rejected: (1 - 1) / 2 = 0
        ("kto_pair", {}, ((1 - s(0.5) + 1 - s(0.5)) + (1 - s(-0.5) + 1 - s(-0.5))) / 4),
        ("robust", {"dpo_label_smoothing": 0.25},
         sum((-0.75 * math.log(s(h)) + 0.25 * math.log(s(-h))) / 0.5 for h in (1, -1)) / 2),
        ("exo_pair", {"dpo_label_smoothing": 0.25},
         sum(s(h) * math.log(s(h) / 0.75) + s(-h) * math.log(s(-h) / 0.25) for h in (1, -1)) / 2),
        ("simpo", {"simpo_gamma": 0.25}, -(math.log(s(0.5 * 0.5 - 0.25)) + math.log(s(0.5 * -2 - 0.25))) / 2),
        ("orpo", {}, sum(-a - 0.5 * math.log(s(odds(a) - odds(b))) for a, b in zip(A, B)) / 2),
    ],
)  # fmt: skip
def test_two_pairs_by_hand(pref_loss, keys, expected):
    def path(tokens, name, score):
        return Path([7, 8, *range(20, 20 + tokens)], [0.0, 0.0] + [1.0] * tokens, name, score)

    items = [
        (Encoded((path(2, "chosen", 1.0), path(1, "rejected", 0.0))), ""),
        (Encoded((path(1, "chosen", 1.0), path(3, "rejected", 0.0))), ""),
    ]
    batch = collate(items, layout="padded", pad_id=3)
    objective = dpo(pref_loss, pref_beta=0.5, **keys)
    totals = batch.units()
    if objective.surveys:
        totals |= {name: float(value) for name, value in objective.survey(HAND, batch).items()}
    loss, logs = objective.loss(HAND, batch.with_totals(totals))
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert logs["rewards/accuracies"] == 0.5
    scores = [A, B] if not KINDS[pref_loss].reference else [[1, -1], [-1, 1]]
    assert logs["rewards/chosen"] == pytest.approx(0.5 * sum(scores[0]) / 2)
    assert logs["rewards/rejected"] == pytest.approx(0.5 * sum(scores[1]) / 2)
    recorded = objective.record(HAND, batch)["reward"].tolist()
    assert recorded == pytest.approx([0.5 * x for pair in zip(*scores) for x in pair])


def test_every_loss_is_another(pair_of_models):
    found = {name: ask(dpo(name), pair_of_models, PAIRS)[0].item() for name in KINDS}
    assert len({round(value, 6) for value in found.values()}) == len(KINDS), found


def test_before_the_first_step_policy_and_reference_agree(pair_of_models):
    same = (pair_of_models[0], in_double(build_model("llama", dtype=torch.float64, seed=0)).eval())
    for name, expected in {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 25.0, "kto_pair": 0.5}.items():
        loss, logs = ask(dpo(name), same, lists([2, 3, 2]))
        assert loss.item() == pytest.approx(expected, abs=1e-12)
        assert logs["rewards/margins"] == pytest.approx(0.0, abs=1e-12)
        assert logs["rewards/chosen"] == pytest.approx(0.0, abs=1e-12)
    assert ask(dpo(ld_alpha=0.2), same, PAIRS)[0].item() == pytest.approx(math.log(2), abs=1e-12)


def test_swapping_chosen_and_rejected_turns_the_margin_round(pair_of_models):
    swapped = [
        (Encoded((Path(w.ids, w.weights, "chosen", 1.0), Path(b.ids, b.weights, "rejected", 0.0))), name)
        for (e, name) in PAIRS
        for b, w in [e.paths]
    ]
    _, logs = ask(dpo(), pair_of_models, PAIRS)
    _, other = ask(dpo(), pair_of_models, swapped)
    assert other["rewards/margins"] == pytest.approx(-logs["rewards/margins"], abs=1e-12)
    assert logs["rewards/margins"] != 0
    assert other["rewards/accuracies"] == pytest.approx(1 - logs["rewards/accuracies"])


def test_the_reference_has_no_dropout_and_is_never_trained(tmp_path):
    items = lists([2] * 4)
    trainer = trainer_for("dpo", tmp_path, items=items, batch=2)
    start, reference = weights(trainer), trainer.setup.reference.own.model
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    reference.config.attention_dropout = 0.5
    for layer in reference.model.layers:
        layer.self_attn.attention_dropout = 0.5
    batch = collate(items, layout="padded", pad_id=3)
    trainer.model.train()
    assert torch.equal(trainer.setup.reference.logps(batch), trainer.setup.reference.logps(batch))
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())
    assert all(parameter.grad is None for parameter in reference.parameters())
    assert any(not torch.equal(value, start[name]) for name, value in weights(trainer).items())


def test_a_policy_learns_to_prefer(tmp_path):
    trainer = trainer_for("dpo", tmp_path, items=lists([2] * 6), batch=6, num_train_epochs=25, lr=0.5)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert logged[-1]["rewards/margins"] > logged[0]["rewards/margins"] + 0.3
    assert logged[-1]["rewards/accuracies"] == 1.0


def test_only_the_losses_without_a_reference_do_without_one():
    assert {name for name in KINDS if dpo(name).frozen == ()} == {"orpo", "simpo"}
    assert dpo().frozen == ("reference",)
    assert not dpo().surveys and dpo("kto_pair").surveys and dpo(pref_bco_weight=1.0).surveys


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pref_beta": 0.0}, "pref_beta: 0.0"),
        ({"pref_ftx": -1.0}, "pref_ftx: -1.0"),
        ({"pref_loss": "simpo", "pref_bco_weight": 1.0}, "pref_bco_weight .* pref_loss: simpo"),
        ({"pref_loss": "hinge", "dpo_label_smoothing": 0.1}, "no meaning with pref_loss: hinge.*sigmoid, robust"),
        ({"dpo_label_smoothing": 0.5}, "dpo_label_smoothing: 0.5"),
        ({"pref_loss": "exo_pair"}, "infinite"),
        ({"simpo_gamma": 1.0}, "simpo_gamma has no meaning with pref_loss: sigmoid"),
        ({"ld_alpha": 1.5}, "ld_alpha: 1.5"),
    ],
)
def test_keys_that_mean_nothing_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        Dpo(DpoConfig(**keys)).start(None)
    Dpo(DpoConfig(pref_loss="exo_pair", dpo_label_smoothing=0.01)).start(None)
