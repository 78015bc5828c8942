"""DiscoRM against scipy, quadrature, closed-form gradients, simulation, and rewards whose distribution is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from scipy.special import expit, log_expit
from tests.conftest import build_model
from tests.exact.runs import batches_for, items_for
from tests.objectives.fakes import Oracle, scored

from luthier.core.errors import ConfigError
from luthier.heads.normal import NormalHead
from luthier.model import heads
from luthier.model.policy import PolicySetup
from luthier.objectives.disco_rm import DiscoRm, DiscoRmConfig, log_preference
from luthier.run import resolve

LOSSES = ("probit", "expected_bt", "mackay", "nll_scores")
GROUPS = [[1.0, 0.0], [3.0, 1.5, 0.5, -1.0], [2.0, 2.0, 0.0]]
GAPS = [-6.0, -1.0, 0.0, 0.3, 4.0]
VARIANCES = [2e-4, 0.5, 3.0, 9.0, 100.0]


def keys_for(loss="probit", **keys):
    return DiscoRmConfig(disco_loss=loss, **keys)


def log_p(gap, variance, keys, dtype=torch.float64):
    return log_preference(torch.tensor(gap, dtype=dtype), torch.tensor(variance, dtype=dtype), keys)


def random_verdict(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(count, generator=generator, dtype=torch.float64)
    return torch.stack([mean, torch.rand(count, generator=generator, dtype=torch.float64) * 3 + 0.1], 1)


# Probabilities of a pair.


@pytest.mark.parametrize("noise", [0.0, 1.0, 1.702])
@pytest.mark.parametrize(("gap", "variance"), itertools.product([*GAPS, -60.0, 60.0], VARIANCES))
def test_probit_is_scipys_normal(gap, variance, noise):
    expected = stats.norm.logcdf(gap / math.sqrt(variance + noise**2))
    keys = keys_for(disco_noise=noise)
    assert log_p(gap, variance, keys).item() == pytest.approx(expected, rel=1e-10)
    assert log_p(gap, variance, keys, torch.float32).item() == pytest.approx(expected, rel=2e-5, abs=1e-30)


@pytest.mark.parametrize("noise", [1.0, 1.702])
@pytest.mark.parametrize(("gap", "variance"), itertools.product([*GAPS, -30.0], VARIANCES))
def test_expected_bt_is_the_integral(gap, variance, noise):
    s, k = math.sqrt(variance), 1.702 / noise
    # Where the integrand is large: at the mean, where the logistic turns, and where the tail of one meets the other.
    points = sorted({0.0, -gap / s, min(k * s, max(-gap / s, 0.0))})
    expected, _ = integrate.quad(
        lambda x: math.exp(stats.norm.logpdf(x) + log_expit(k * (gap + s * x))),
        -15, 15, points=[p for p in points if -15 < p < 15], epsabs=0, epsrel=1e-11, limit=500,
    )  # fmt: skip
    found = log_p(gap, variance, keys_for("expected_bt", disco_noise=noise)).item()
    # Beyond ten logistic deviations the rule's nodes begin to miss the logistic's bend.
    assert found == pytest.approx(math.log(expected), rel=1e-6 if k * s < 10.1 else 1e-4, abs=1e-7)


@pytest.mark.parametrize("noise", [0.5, 1.0, 1.702])
@pytest.mark.parametrize(("gap", "variance"), itertools.product(GAPS, [0.01, 0.5, 3.0]))
def test_mackay_is_its_formula_and_near_the_expectation(gap, variance, noise):
    found = log_p(gap, variance, keys_for("mackay", disco_noise=noise)).item()
    k = 1.702 / noise
    assert found == pytest.approx(log_expit(k * gap / math.sqrt(1 + math.pi * k**2 * variance / 8)), abs=1e-12)
    exact = log_p(gap, variance, keys_for("expected_bt", disco_noise=noise)).exp().item()
    assert math.exp(found) == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("gap", "variance"), itertools.product(GAPS, [0.5, 9.0]))
def test_the_probabilities_of_a_pair_and_its_reverse_sum_to_one(loss, gap, variance):
    keys = keys_for(loss)
    assert (log_p(gap, variance, keys).exp() + log_p(-gap, variance, keys).exp()).item() == pytest.approx(1, abs=1e-9)


def test_probit_is_how_often_one_draw_beats_another():
    rng = np.random.default_rng(0)
    n, (m1, v1), (m2, v2), t0 = 1_000_000, (0.7, 1.5), (0.1, 0.4), 0.8
    wins = rng.normal(m1, math.sqrt(v1), n) - rng.normal(m2, math.sqrt(v2), n) + rng.normal(0, t0, n) > 0
    p = log_p(m1 - m2, v1 + v2, keys_for(disco_noise=t0)).exp().item()
    assert abs(wins.mean() - p) < 4 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("loss", ["probit", "expected_bt", "mackay"])
def test_without_variance_it_is_the_ordinary_reward_model(loss):
    for gap in np.linspace(-8, 8, 33):
        assert log_p(gap, 1e-9, keys_for(loss)).exp().item() == pytest.approx(expit(gap), abs=0.0096)


# The loss.


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("prior", [0.0, 0.05])
def test_the_loss_is_the_loop(loss, prior):
    keys, verdict = keys_for(loss, disco_prior=prior), random_verdict(9)
    found, _ = DiscoRm(keys).loss(Oracle(verdict), scored(GROUPS))
    mean, variance = verdict.T.tolist()
    total, start = 0.0, 0
    for scores in GROUPS:
        ids = range(start, start + len(scores))
        if loss == "nll_scores":
            draws = [-stats.norm.logpdf(scores[i - start], mean[i], math.sqrt(variance[i])) for i in ids]
        else:
            pairs = [(i, j) for i, j in itertools.permutations(ids, 2) if scores[i - start] > scores[j - start]]
            draws = [-_oracle(loss, mean[i] - mean[j], variance[i] + variance[j]) for i, j in pairs]
        total += np.mean(draws) + prior * np.mean([_kl(mean[i], variance[i]) for i in ids])
        start += len(scores)
    assert found.item() == pytest.approx(total / len(GROUPS), abs=1e-8)


def _oracle(loss, gap, variance):
    if loss == "probit":
        return stats.norm.logcdf(gap / math.sqrt(variance + 1.702**2))
    if loss == "mackay":
        return log_expit(gap / math.sqrt(1 + math.pi * variance / 8))
    density = stats.norm(gap, math.sqrt(variance)).pdf
    return math.log(integrate.quad(lambda z: density(z) * expit(z), gap - 30, gap + 30, limit=400, points=[gap, 0])[0])


def _kl(mean, variance):
    normal = torch.distributions.Normal
    ours, prior = normal(torch.tensor(mean).double(), math.sqrt(variance)), normal(torch.tensor(0.0).double(), 1.0)
    return torch.distributions.kl_divergence(ours, prior).item()


def test_a_pair_by_hand():
    """z = 1 / sqrt(0.5 + 0.5 + 0) = 1: -ln Phi(1) = 0.172753, (1 - 0.841345)^2 = 0.025171."""
    verdict = torch.tensor([[1.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
    loss, logs = DiscoRm(keys_for(disco_noise=0.0, disco_prior=0.0)).loss(Oracle(verdict), scored([[1, 0]]))
    assert loss.item() == pytest.approx(0.172753, abs=1e-6)
    found = {name: value.item() for name, value in logs.items()}
    # KL: 0.5 (m^2 + 0.5 - 1 - ln 0.5) is 1.221574 and 0.221574.
    assert found == pytest.approx(
        {"nll": 0.172753, "brier": 0.025171, "accuracy": 1, "margin": 1, "variance_better": 0.5, "variance_worse": 0.5,
         "prior": 0.721574},
        abs=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("loss", ["probit", "expected_bt", "mackay"])
def test_equal_means_cost_ln_2_whatever_the_variances(loss):
    verdict = random_verdict(9)
    verdict[:, 0] = 0.3
    found, logs = DiscoRm(keys_for(loss, disco_prior=0.0)).loss(Oracle(verdict), scored(GROUPS))
    assert found.item() == pytest.approx(math.log(2), abs=1e-12)
    assert logs["accuracy"].item() == 0.0


def test_a_fresh_head_pays_no_prior():
    verdict = torch.tensor([[0.0, 1.0]] * 2, dtype=torch.float64)
    found, logs = DiscoRm(keys_for(disco_prior=10.0)).loss(Oracle(verdict), scored([[1, 0]]))
    assert logs["prior"].item() == 0.0 and found.item() == pytest.approx(math.log(2))


def test_swapping_chosen_and_rejected_turns_p_into_1_minus_p():
    verdict = random_verdict(2)
    (_, logs), (_, swapped) = (DiscoRm().loss(Oracle(verdict), scored([s])) for s in ([1, 0], [0, 1]))
    assert math.exp(-logs["nll"]) + math.exp(-swapped["nll"]) == pytest.approx(1)
    assert logs["margin"].item() == -swapped["margin"].item() != 0
    assert logs["variance_better"].item() == swapped["variance_worse"].item()


def test_gradients_have_the_closed_form():
    """h = phi(z) / Phi(z): dL/dm_better = -h / s, and dL/dv = h D / (2 s^3) for both variances."""
    for noise, (m1, v1, m2, v2) in itertools.product((0.0, 1.702), ((0.2, 0.5, 1.4, 0.7), (2.0, 0.3, -1.0, 0.1))):
        verdict = torch.tensor([[m1, v1], [m2, v2]], dtype=torch.float64, requires_grad=True)
        DiscoRm(keys_for(disco_noise=noise, disco_prior=0.0)).loss(Oracle(verdict), scored([[1, 0]]))[0].backward()
        gap, s = m1 - m2, math.sqrt(v1 + v2 + noise**2)
        h = math.exp(stats.norm.logpdf(gap / s) - stats.norm.logcdf(gap / s))
        slope = h * gap / (2 * s**3)
        expected = np.array([[-h / s, slope], [h / s, slope]])
        assert verdict.grad.numpy() == pytest.approx(expected, rel=1e-9)
        assert (slope < 0) == (gap < 0), "a pair that is ranked wrongly makes both variances grow"


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_the_derivatives(loss):
    verdict = random_verdict(9).requires_grad_(True)
    objective, batch = DiscoRm(keys_for(loss, disco_prior=0.01)), scored(GROUPS)
    assert torch.autograd.gradcheck(lambda v: objective.loss(Oracle(v), batch)[0], verdict)


@pytest.mark.parametrize("loss", ["probit", "expected_bt", "mackay"])
@pytest.mark.parametrize("gap", [-1e3, -40.0, 40.0, 1e3])
def test_far_tails_are_finite_in_float32(loss, gap):
    verdict = torch.tensor([[gap, 0.3], [0.0, 0.2]], requires_grad=True)
    found, _ = DiscoRm(keys_for(loss, disco_prior=0.0)).loss(Oracle(verdict), scored([[1, 0]]))
    found.backward()
    assert torch.isfinite(found) and torch.isfinite(verdict.grad).all()
    if gap < 0:
        assert verdict.grad[0, 0] < 0, "there is still a slope to climb"


def test_only_noise_or_a_prior_fix_the_scale():
    verdict, batch = random_verdict(9), scored(GROUPS)
    scaled = verdict * torch.tensor([5.0, 25.0], dtype=torch.float64)

    def cost(said, **keys):
        return DiscoRm(DiscoRmConfig(**keys)).loss(Oracle(said), batch)[0].item()

    free = {"disco_noise": 0.0, "disco_prior": 0.0}
    assert cost(verdict, **free) == pytest.approx(cost(scaled, **free), abs=1e-12)
    for keys in ({"disco_noise": 1.702, "disco_prior": 0.0}, {"disco_noise": 0.0, "disco_prior": 0.001}):
        assert abs(cost(verdict, **keys) - cost(scaled, **keys)) > 1e-3


def test_the_best_against_the_others():
    verdict, scores = random_verdict(4), [3.0, 1.5, 0.5, -1.0]
    found, _ = DiscoRm(keys_for(disco_pairs="best", disco_prior=0.0)).loss(Oracle(verdict), scored([scores]))
    mean, variance = verdict.T.tolist()
    expected = -np.mean([_oracle("probit", mean[0] - mean[j], variance[0] + variance[j]) for j in (1, 2, 3)])
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_answers_that_nobody_scored_have_no_likelihood():
    verdict = random_verdict(3).requires_grad_(True)
    objective = DiscoRm(keys_for("nll_scores", disco_prior=0.0))
    found, _ = objective.loss(Oracle(verdict), scored([[0.0, float("nan"), 1.0]]))
    found.backward()
    mean, variance = verdict.detach().T.tolist()
    expected = -np.mean([stats.norm.logpdf(y, mean[i], math.sqrt(variance[i])) for i, y in ((0, 0.0), (2, 1.0))])
    assert found.item() == pytest.approx(expected)
    assert verdict.grad[1].tolist() == [0.0, 0.0]


# With a model.


@pytest.mark.parametrize("loss", LOSSES)
def test_layouts_agree(loss):
    objective = DiscoRm(keys_for(loss))
    items = items_for(objective, 5, seed=2)
    model = build_model("llama", dtype=torch.float64)
    head = heads.attach(model, "normal", objective.config, seed=1)
    torch.nn.init.normal_(head.variance.weight)
    setup, found = PolicySetup(model, head=head), []
    for layout in ("padded", "packed", "shared"):
        model.zero_grad()
        value, _ = objective.loss(setup.bind(), batches_for(objective, items, layout))
        value.backward()
        found.append((value.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for value, gradient in found[1:]:
        assert value == pytest.approx(found[0][0], abs=1e-7)
        # transformers' RMSNorm rounds to float32.
        assert (gradient - found[0][1]).abs().max() < 1e-6 * gradient.abs().max()


def test_it_recovers_means_and_variances_of_thurstone_judgements():
    """60 items with known means and deviations, 100 000 noisy comparisons, fitted through the head."""
    rng = np.random.default_rng(1)
    items, draws = 60, 100_000
    mean, deviation = rng.normal(0, 1.5, items), np.exp(rng.normal(0, 0.7, items))
    a, b = rng.integers(0, items, draws), rng.integers(0, items - 1, draws)
    b = b + (b >= a)
    first = rng.normal(mean[a], deviation[a]) > rng.normal(mean[b], deviation[b])
    winner, loser = np.where(first, a, b), np.where(first, b, a)
    cell, count = np.unique(winner * items + loser, return_counts=True)
    better, worse = torch.from_numpy(cell // items), torch.from_numpy(cell % items)
    weight = torch.from_numpy(count / draws).float()
    keys = keys_for(disco_noise=0.0, disco_prior=0.0)
    torch.manual_seed(0)
    head, hidden = NormalHead(items, keys), torch.eye(items)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(400):
        m, v = head(hidden).unbind(-1)
        loss = -(weight * log_preference(m[better] - m[worse], v[better] + v[worse], keys)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert stats.spearmanr(m.detach(), mean).statistic > 0.95
    assert stats.spearmanr(v.detach(), deviation).statistic > 0.7


# Keys.


def config(**keys):
    return {"model_name_or_path": "m", "dataset": "d.jsonl", "output_dir": "o"} | keys


@pytest.mark.parametrize("said", [True, "true", "yes"])
def test_stage_rm_with_is_disco_is_this_stage(said):
    run = resolve(config(stage="rm", is_disco=said, disco_noise=1.0))
    assert run.stage == "disco_rm" and type(run.objective) is DiscoRm
    assert run.objective.config.disco_noise == 1.0 and not run.warnings
    again = resolve({"stage": "disco_rm", "is_disco": True} | config())
    assert again.stage == "disco_rm"


def test_stage_rm_without_it_is_the_ordinary_one_and_says_what_has_no_effect():
    run = resolve(config(stage="rm", is_disco=False, disco_noise=1.0))
    assert run.stage == "rm"
    assert len(run.warnings) == 1 and "disco_noise belongs to stage disco_rm" in run.warnings[0]


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"stage": "rm", "is_disco": "perhaps"}, "is_disco: expected true or false"),
        ({"stage": "disco_rm", "is_disco": False}, "is_disco: false contradicts stage: disco_rm"),
        ({"stage": "disco_rm", "disco_loss": "logistic"}, "disco_loss: expected one of probit"),
        ({"stage": "disco_rm", "disco_noise": -1}, "disco_noise: -1.0 must be 0 or more"),
        ({"stage": "disco_rm", "disco_noise": 0, "disco_loss": "mackay"}, "whose noise is logistic"),
        ({"stage": "disco_rm", "disco_noise": 1, "disco_loss": "nll_scores"}, "compares nothing"),
        ({"stage": "disco_rm", "disco_floor": 0}, "disco_floor: 0.0 must be above 0"),
        ({"stage": "disco_rm", "disco_floor": 1}, "disco_floor: 1.0 must be above 0"),
        ({"stage": "disco_rm", "disco_prior": -1}, "disco_prior: -1.0 must be 0 or more"),
        ({"stage": "disco_rm", "disco_dropout": 1}, "disco_dropout: 1.0 must be from 0"),
    ],
)
def test_impossible_keys(keys, complaint):
    with pytest.raises(ConfigError, match=complaint):
        resolve(config(**keys))


def test_another_stage_says_that_is_disco_is_not_its_own():
    run = resolve(config(stage="sft", is_disco=True))
    assert run.stage == "sft" and any("is_disco belongs to stage" in line for line in run.warnings)
