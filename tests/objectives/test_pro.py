"""PRO against the paper's formula from plain forward passes, closed forms, and plain SFT where it begins with that."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tests.exact.conftest import gradients
from tests.exact.runs import trainer_for
from tests.objectives.lists import (
    LAYOUTS,
    Told,
    double_model,
    furthest,
    lay_out,
    lists,
    luthier_loss,
    plain_logps,
    told,
)

from luthier.core.errors import ConfigError
from luthier.core.registry import find
from luthier.core.types import Encoded
from luthier.data.renderer import make_renderer
from luthier.data.source import COLUMNS, Columns
from luthier.data.template import TemplateConfig
from luthier.model.policy import PolicySetup
from luthier.objectives.pro import Pro, ProConfig
from luthier.objectives.sft import Sft

RAGGED = ([3.0, 1.5, 0.5, -1.0], [0.0, 1.0], [2.0, 5.0, 1.0], [1.0, 0.0, -1.0, -2.0, -4.0])


def pro(**keys):
    return Pro(ProConfig(**keys))


def by_formula(model, items, *, n=None, scale=1.0, weight=0.05):
    """The paper's loss, explicit denominators and all: no pairs, no batches, no logarithm of sums."""
    total = 0.0
    for encoded, _ in items:
        tokens = plain_logps(model, encoded)
        reward = sorted((path.score for path in encoded.paths), reverse=True)
        size = min(n or len(tokens), len(tokens))
        s = [sum(answer) / len(answer) for answer in tokens]
        for k in range(size - 1):
            temperature = [scale * (reward[k] - reward[i]) for i in range(size)]
            numerator = torch.exp(s[k] * max(temperature[k + 1 :]))
            denominator = numerator
            for i in range(k + 1, size):
                denominator = denominator + torch.exp(s[i] * temperature[i])
            total = total - torch.log(numerator / denominator)
        total = total - weight * (size - 1) ** 2 * sum(tokens[0])
    return total / len(items)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keys", [{}, {"pro_stage": 3, "reward_scale": 0.5, "pro_sft_weight": 0.2}])
def test_loss_and_gradients_are_the_papers(layout, keys):
    model, items = double_model(), lists(*RAGGED)
    expected = by_formula(
        model,
        items,
        n=keys.get("pro_stage"),
        scale=keys.get("reward_scale", 1.0),
        weight=keys.get("pro_sft_weight", 0.05),
    )
    loss, found = luthier_loss(pro(**keys), model, items, layout)
    assert loss == pytest.approx(expected.item(), abs=1e-9)
    assert furthest(found, gradients(model, expected)) < 1e-9


def test_the_authors_code_agrees_where_its_epsilon_does_not_matter():
    """Their loop over stages, with [batch, K] scores and rewards, epsilon included."""
    logp = torch.tensor([[-1.0, -1.5, -0.7, -2.0], [-0.3, -0.9, -1.1, -0.2]], dtype=torch.float64)
    rewards = torch.tensor([[3.0, 1.5, 0.5, -1.0], [2.0, 1.0, 0.5, 0.0]], dtype=torch.float64)
    total = 0.0
    for time in range(3):
        temperatures = rewards[:, time, None] - rewards[:, time + 1 :]
        sharpest = temperatures.max(dim=1).values
        others = torch.exp(logp[:, time + 1 :] * temperatures).sum(dim=1)
        own = logp[:, time] * sharpest
        total = total + (torch.log(1e-10 + torch.exp(own) + others) - own).mean()
    total = total + 0.05 * 3**2 * -logp[:, 0].mean()
    loss, _ = pro().loss(Told(logp.flatten()), told(rewards.tolist()))
    assert loss.item() == pytest.approx(total.item(), abs=1e-7)


def test_two_answers_are_a_logistic_loss():
    s = torch.tensor([-1.3, -0.4], dtype=torch.float64)
    loss, _ = pro(reward_scale=2.0, pro_sft_weight=0.5).loss(Told(s), told([[3.0, 1.5]]))
    # T = 2 * 1.5; -log sigma(3 * (-1.3 + 0.4)) + 0.5 * 1 * 1.3
    assert loss.item() == pytest.approx(math.log(1 + math.exp(2.7)) + 0.65, abs=1e-12)


def test_three_answers_by_hand():
    s = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    loss, logs = pro().loss(Told(s), told([[4.0, 3.0, 1.0]]))
    # k = 0: T against the others 1 and 3, so 3 for itself: exponents -3, -2, -1.5; k = 1: 2: exponents -4, -1.
    first = math.log(math.exp(-3) + math.exp(-2) + math.exp(-1.5)) + 3
    second = math.log(math.exp(-4) + math.exp(-1)) + 4
    assert logs["ranking_loss"].item() == pytest.approx(first + second, abs=1e-12)
    assert logs["sft_loss"].item() == pytest.approx(0.05 * 4 * 1.0, abs=1e-12)
    assert loss.item() == pytest.approx(first + second + 0.2, abs=1e-12)


def test_unlikely_answers_keep_an_exact_loss_and_a_finite_gradient():
    for values, expected in (
        ([-9.0, -9.5], math.log1p(math.exp(-2.0))),  # the authors' epsilon makes 12.97 of such sums
        ([-4000.0, -3999.9], math.log1p(math.exp(0.4))),
        ([-1e6, -1.0], 4 * (1e6 - 1)),
        ([-1.0, -1e6], 0.0),
    ):
        for dtype in (torch.float64, torch.float32):
            s = torch.tensor(values, dtype=dtype, requires_grad=True)
            loss, _ = pro(pro_sft_weight=0.0).loss(Told(s), told([[4.0, 0.0]]))
            loss.backward()
            assert loss.item() == pytest.approx(expected, rel=1e-6 if dtype == torch.float64 else 1e-3)
            assert torch.isfinite(s.grad).all()


def test_gradcheck():
    batch = told([[3.0, 1.5, 0.5, -1.0], [1.0, 0.0], [2.0, 2.0, 1.0]])
    s = -torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    assert torch.autograd.gradcheck(lambda values: pro().loss(Told(values), batch)[0], s.requires_grad_())


def test_the_order_of_candidates_means_nothing():
    model, items = double_model(), lists(*RAGGED)
    turned = [(Encoded(encoded.paths[::-1]), name) for encoded, name in items]
    assert luthier_loss(pro(), model, items)[0] == pytest.approx(luthier_loss(pro(), model, turned)[0], abs=1e-12)


def test_equal_scores_do_not_compete():
    s = torch.tensor([-1.0, -0.3, -2.0], dtype=torch.float64)
    expected = math.log1p(math.exp(2 * -2.0 + 2 * 1.0)) + math.log1p(math.exp(2 * -2.0 + 2 * 0.3))
    for values, scores in ((s, [3.0, 3.0, 1.0]), (s[[1, 0, 2]], [3.0, 3.0, 1.0]), (s[[2, 0, 1]], [1.0, 3.0, 3.0])):
        _, logs = pro().loss(Told(values), told([scores]))
        assert logs["ranking_loss"].item() == pytest.approx(expected, abs=1e-12)
    # Two that tie at the bottom both stand against the first: T is 2 for all three.
    _, logs = pro().loss(Told(s), told([[3.0, 1.0, 1.0]]))
    bottom = math.log(math.exp(-2.0) + math.exp(-0.6) + math.exp(-4.0)) + 2.0
    assert logs["ranking_loss"].item() == pytest.approx(bottom, abs=1e-12)


def test_a_list_of_nothing_but_ties_ranks_nothing():
    values = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    loss, _ = pro(pro_sft_weight=0.0).loss(Told(values), told([[1.0, 1.0, 1.0]]))
    loss.backward()
    assert loss.item() == 0.0 and not values.grad.any()


def test_a_stage_forgets_the_candidates_below_it():
    model, items = double_model(), lists(*RAGGED)
    for n in (2, 3, 4):
        best = [
            (Encoded(tuple(sorted(encoded.paths, key=lambda path: -path.score)[:n])), name) for encoded, name in items
        ]
        loss, found = luthier_loss(pro(pro_stage=n), model, items)
        expected, wanted = luthier_loss(pro(), model, best)
        assert loss == pytest.approx(expected, abs=1e-12)
        assert furthest(found, wanted) < 1e-12


def only_best(items):
    return [(Encoded((max(encoded.paths, key=lambda path: path.score),)), name) for encoded, name in items]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cut", [[4], [1, 3], [2, 1, 1]])
def test_the_curriculum_begins_as_sft_on_the_best(layout, cut):
    model, items = double_model(), lists(*RAGGED)
    loss, found = luthier_loss(pro(pro_schedule="curriculum"), model, items, layout, progress=0.0, cut=cut)
    expected, wanted = luthier_loss(Sft(), model, only_best(items))
    assert loss == pytest.approx(expected, abs=1e-9)
    assert furthest(found, wanted) < 1e-9


@pytest.mark.parametrize(
    ("progress", "stage"),
    [(0.0, 1), (0.249, 1), (0.25, 2), (0.499, 2), (0.5, 3), (0.75, 4), (0.999, 4), (1.0, 4)],
)
def test_the_curriculum_climbs_in_equal_parts(progress, stage):
    model, items = double_model(), lists([3.0, 1.5, 0.5, -1.0], [9.0, 7.0, 8.0, 5.0], [0.0, 1.0, 2.0, 3.0, 4.0])
    loss, _ = luthier_loss(pro(pro_schedule="curriculum", pro_stage=4), model, items, progress=progress)
    fixed = pro(pro_stage=stage) if stage > 1 else Sft()
    assert loss == pytest.approx(luthier_loss(fixed, model, items if stage > 1 else only_best(items))[0], abs=1e-9)


def test_every_list_climbs_to_its_own_length_when_no_stage_is_named():
    items = lists([3.0, 2.0, 1.0], [1.0, 0.0])
    model, objective = double_model(), pro(pro_schedule="curriculum")
    # A third in: the list of three ranks two, the list of two still has its best trained alone (tokens of both count).
    tokens = [plain_logps(model, encoded) for encoded, _ in items]
    pair = by_formula(model, [(Encoded(items[0][0].paths), "row")], n=2)
    alone = -sum(tokens[1][0]) / (len(tokens[0][0]) + len(tokens[1][0]))
    loss, _ = luthier_loss(objective, model, items, progress=1 / 3)
    assert loss == pytest.approx((pair / 2 + alone).item(), abs=1e-9)
    assert luthier_loss(objective, model, items)[0] == pytest.approx(by_formula(model, items).item(), abs=1e-9)


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.4, 0.6])
def test_the_curriculum_is_exact_however_a_step_is_cut(progress):
    model, items = double_model(), lists(*RAGGED)
    objective = pro(pro_schedule="curriculum")
    whole, wanted = luthier_loss(objective, model, items, progress=progress)
    for cut in ([1, 3], [2, 0, 2], [1, 1, 1, 1]):
        loss, found = luthier_loss(objective, model, items, "shared", progress, cut)
        assert loss == pytest.approx(whole, abs=1e-9)
        assert furthest(found, wanted) < 1e-9


def test_a_run_climbs_and_is_evaluated_at_the_top(tmp_path):
    trainer = trainer_for("pro", tmp_path, items=lists(*[[3.0, 1.5, 0.5, -1.0]] * 8), batch=2, lr=1e-3)
    trainer.objective = pro(pro_schedule="curriculum")
    trainer.train()
    assert [entry["stage"] for entry in trainer.state.log_history if "stage" in entry] == [1, 2, 3, 4]
    assert trainer.evaluate()["eval_stage"] == 4
    trainer.objective = pro()
    fixed = trainer.evaluate()["eval_loss"]
    trainer.objective = pro(pro_schedule="curriculum")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(fixed, abs=1e-12)


def test_a_step_of_its_own_needs_no_survey():
    s = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    loss, _ = pro(pro_schedule="curriculum").loss(Told(s), told([[1.0, 0.0]]))
    assert loss.item() == pytest.approx(F.softplus(torch.tensor(-1.0)).item() + 0.05, abs=1e-6)


def test_pairs_of_chosen_and_rejected_are_lists_of_two(tokenizer):
    columns = Columns({**COLUMNS, "chosen": "chosen", "rejected": "rejected"}, ranking=True)
    row = {"instruction": "hello", "chosen": "a violin maker", "rejected": "no"}
    renderer = make_renderer(TemplateConfig(template="chatml"), tokenizer)
    items = [
        (encoded, "row")
        for encoded in pro().encode(find("formats", "alpaca").read(row, columns), renderer, cutoff_len=64)
    ]
    model = double_model()
    assert luthier_loss(pro(), model, items)[0] == pytest.approx(by_formula(model, items).item(), abs=1e-9)


def test_what_is_measured():
    # First list: 2 of its 5 untied pairs in order, a best one on top; second: none of 1.
    s = torch.tensor([-2.0, -0.5, -1.0, -1.5, -3.0, -1.0], dtype=torch.float64)
    batch = told([[3.0, 3.0, 1.0, 2.0], [1.0, 0.0]])
    _, logs = pro().loss(Told(s), batch)
    assert logs["ranking_accuracy"].item() == pytest.approx((2 / 5 + 0) / 2)
    assert logs["best_first"].item() == pytest.approx(1 / 2)
    assert logs["best_logp"].item() == pytest.approx((-2.0 - 3.0) / 2)
    assert "stage" not in logs
    _, logs = pro(pro_schedule="curriculum").loss(Told(s), batch.with_totals({"group": 2, "best_token": 2}, 0.5))
    assert logs["stage"].item() == pytest.approx((3 + 2) / 2)


def test_equal_log_probs_are_in_no_order():
    s = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    _, logs = pro().loss(Told(s), told([[1.0, 0.0]]))
    assert logs["ranking_accuracy"].item() == logs["best_first"].item() == 0.0


def test_what_predictions_hold():
    model, items = double_model(), lists([2.0, 1.0])
    found = pro().record(PolicySetup(model).bind(), lay_out(items, "shared"))
    for answer, tokens in enumerate(plain_logps(model, items[0][0])):
        assert found["logp"][answer].item() == pytest.approx(sum(tokens).item(), abs=1e-9)
        assert found["mean_logp"][answer].item() == pytest.approx(sum(tokens).item() / len(tokens), abs=1e-9)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"pro_stage": 1}, "pro_stage: 1 ranks nothing.*pro_schedule: curriculum"),
        ({"pro_stage": 1, "pro_schedule": "curriculum"}, "pro_stage: 1"),
        ({"pro_sft_weight": -0.1}, "pro_sft_weight: -0.1"),
        ({"reward_scale": 0.0}, "reward_scale: 0.0"),
        ({"reward_scale": float("nan")}, "reward_scale: nan"),
    ],
)
def test_keys_that_make_no_sense(keys, expected):
    with pytest.raises(ConfigError, match=expected):
        pro(**keys).start(None)
