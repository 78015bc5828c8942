"""The reward model's loss against a loop of its own, TRL's formula, and numbers worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import expit
from tests.conftest import build_model
from tests.exact.runs import batches_for, items_for, setup_for
from tests.objectives.fakes import Oracle, scored

from luthier.core.errors import ConfigError
from luthier.core.objective import NoKeys
from luthier.objectives.rm import Rm, RmConfig

GROUPS = [[1.0, 0.0], [3.0, 1.5, 0.5, -1.0], [2.0, 2.0, 0.0]]


def ask(rewards, groups, **keys):
    rewards = torch.as_tensor(rewards, dtype=torch.float64)[:, None]
    return Rm(RmConfig(**keys)).loss(Oracle(rewards), scored(groups))


def by_loop(rewards, groups, margin=0.0, center=0.0, best=False):
    total, start = 0.0, 0
    for scores in groups:
        pairs = [(i, j) for i, j in itertools.permutations(range(len(scores)), 2) if scores[i] > scores[j]]
        if best:
            pairs = [(i, j) for i, j in pairs if scores[i] == max(scores)]
        losses = []
        for i, j in pairs:
            a, b = rewards[start + i], rewards[start + j]
            losses.append(-math.log(expit(a - b - margin * (scores[i] - scores[j]))) + center * (a + b) ** 2)
        total += sum(losses) / len(losses)
        start += len(scores)
    return total / len(groups)


@pytest.mark.parametrize(
    "keys", [{}, {"margin": 0.7}, {"center": 0.01}, {"best": True}, {"margin": 0.3, "center": 0.1, "best": True}]
)
def test_the_loss_is_the_loop(keys):
    rewards = np.random.default_rng(0).normal(size=9)
    names = {"margin": "rm_margin", "center": "rm_center", "best": "rm_pairs"}
    given = {names[key]: "best" if key == "best" else value for key, value in keys.items()}
    loss, _ = ask(rewards, GROUPS, **given)
    assert loss.item() == pytest.approx(by_loop(rewards, GROUPS, **keys), abs=1e-12)


def test_two_pairs_by_hand():
    """-ln sigma(2) = 0.126928, -ln sigma(-1) = 1.313262; their mean, one of two right, mean margin 0.5."""
    loss, logs = ask([3.0, 1.0, 0.0, 1.0], [[1, 0], [1, 0]])
    assert loss.item() == pytest.approx(0.720095, abs=1e-6)
    assert {name: value.item() for name, value in logs.items()} == {"accuracy": 0.5, "margin": 0.5, "reward": 1.25}


def test_pairs_are_as_in_trl():
    """RewardTrainer: -logsigmoid(chosen - rejected - margin).mean() + c * mean((chosen + rejected)^2)."""
    generator = torch.Generator().manual_seed(4)
    chosen, rejected = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    expected = -torch.nn.functional.logsigmoid(chosen - rejected - 0.25).mean()
    expected += 0.01 * torch.mean((chosen + rejected) ** 2)
    loss, logs = ask(torch.stack([chosen, rejected], 1).reshape(-1), [[1, 0]] * 16, rm_margin=0.25, rm_center=0.01)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert logs["accuracy"].item() == (chosen > rejected).double().mean().item()


def test_equal_rewards_cost_ln_2_and_are_no_success():
    loss, logs = ask([0.4] * 9, GROUPS)
    assert loss.item() == pytest.approx(math.log(2))
    assert logs["accuracy"].item() == 0.0


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_reward_or_a_score_of_zero_is_a_number_like_others(zero):
    loss, _ = ask([zero, 1.0], [[1.0, zero]])
    assert loss.item() == pytest.approx(-math.log(expit(-1.0)))
    loss, _ = ask([1.0, zero], [[zero, -1.0]])
    assert loss.item() == pytest.approx(-math.log(expit(1.0)))


def test_swapping_chosen_and_rejected_flips_the_margin_exactly():
    rewards = np.random.default_rng(1).normal(size=8)
    _, logs = ask(rewards, [[1, 0]] * 4)
    _, swapped = ask(rewards, [[0, 1]] * 4)
    assert logs["margin"].item() == -swapped["margin"].item() != 0
    assert logs["accuracy"].item() == 1 - swapped["accuracy"].item()


def test_the_order_of_a_rankings_answers_does_not_matter():
    rewards = np.random.default_rng(2).normal(size=4)
    order = [2, 0, 3, 1]
    loss, _ = ask(rewards, [[3.0, 1.5, 0.5, -1.0]])
    shuffled, _ = ask(rewards[order], [[np.array([3.0, 1.5, 0.5, -1.0])[i] for i in order]])
    assert loss.item() == pytest.approx(shuffled.item(), abs=1e-14)


def test_gradients_are_the_derivatives():
    rewards = torch.randn(9, dtype=torch.float64, requires_grad=True)
    batch = scored(GROUPS)
    objective = Rm(RmConfig(rm_margin=0.5, rm_center=0.1))
    assert torch.autograd.gradcheck(lambda r: objective.loss(Oracle(r[:, None]), batch)[0], rewards)


def test_far_apart_rewards_are_finite():
    rewards = torch.tensor([-2e4, 2e4], requires_grad=True)
    loss, _ = Rm().loss(Oracle(rewards[:, None]), scored([[1, 0]]))
    loss.backward()
    assert loss.item() == 4e4 and rewards.grad.tolist() == [-1.0, 1.0]


def test_a_head_that_has_just_been_made_costs_about_ln_2():
    objective = Rm()
    setup = setup_for(objective, build_model("llama"))
    loss, _ = objective.loss(setup.bind(), batches_for(objective, items_for(objective, 6)))
    assert loss.item() == pytest.approx(math.log(2), abs=0.1)


def test_records_are_the_rewards_of_each_answer_in_order():
    """Each answer tagged by its length: a batch sorted or regrouped on the way would show."""
    objective = Rm()
    setup = setup_for(objective, build_model("llama"))
    items = items_for(objective, 5, seed=9)
    whole = objective.record(setup.bind(), batches_for(objective, items, "shared"))["reward"].tolist()
    alone = [
        setup.head(setup.model.model(input_ids=torch.tensor([path.ids])).last_hidden_state[:, -1]).item()
        for encoded, _ in items
        for path in encoded.paths
    ]
    assert whole == pytest.approx(alone, abs=1e-5)
    assert len(set(np.round(alone, 6))) == len(alone)


@pytest.mark.parametrize(("keys", "name"), [({"rm_margin": -1.0}, "rm_margin"), ({"rm_center": -0.1}, "rm_center")])
def test_impossible_keys(keys, name):
    with pytest.raises(ConfigError, match=f"{name}: -"):
        RmConfig(**keys)
    assert RmConfig is Rm.Config is not NoKeys
