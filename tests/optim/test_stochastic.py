"""pure_bf16: updates far below a weight's precision are not lost on average, and runs can be repeated and resumed."""

from __future__ import annotations

import copy

import torch

from luthier.optim._rounding import StochasticAdamW, round_into

ONE = 1e-5


def optimiser(weight, seed=0, **keys):
    return StochasticAdamW([{"params": [("w", weight)]}], lr=ONE, seed=seed, **keys)


def train(weight, optimizer, steps=100):
    """The gradient always points the same way, so AdamW moves every weight by its rate at every step."""
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight


def weight(dtype=torch.bfloat16, size=20_000):
    return torch.nn.Parameter(torch.ones(size, dtype=dtype))


def test_torchs_adamw_loses_every_update_and_this_one_none_on_average():
    lost = weight()
    train(lost, torch.optim.AdamW([lost], lr=ONE, weight_decay=0.0))
    assert torch.equal(lost, torch.ones_like(lost))
    kept = weight()
    train(kept, optimiser(kept))
    exact = weight(torch.float32)
    train(exact, torch.optim.AdamW([exact], lr=ONE, weight_decay=0.0))
    should = 1 - exact.detach().mean().item()
    assert abs(should - 1e-3) < 5e-6
    assert abs((1 - kept.detach().float().mean().item()) - should) < 0.1 * should
    assert kept.dtype == torch.bfloat16


def test_rounding_is_up_or_down_to_a_neighbour_with_the_right_mean():
    exact = torch.full((50_000,), 1 + 0.3 / 128)
    target = torch.empty(50_000, dtype=torch.bfloat16)
    round_into(target, exact, torch.Generator().manual_seed(0))
    assert set(target.float().tolist()) == {1.0, 1 + 1 / 128}
    assert abs(target.float().mean().item() - (1 + 0.3 / 128)) < 0.02 / 128
    negative = torch.empty(50_000, dtype=torch.bfloat16)
    round_into(negative, -exact, torch.Generator().manual_seed(0))
    assert torch.equal(negative, -target)


def test_what_a_bfloat16_holds_exactly_is_not_touched_and_what_is_not_finite_shows():
    exact = torch.tensor([1.0, -2.5, 0.0, float("inf"), float("-inf"), float("nan")])
    target = torch.empty(6, dtype=torch.bfloat16)
    round_into(target, exact, torch.Generator().manual_seed(0))
    assert torch.equal(target[:5].float(), exact[:5]) and target[5].isnan()
    whole = torch.empty(6)
    round_into(whole, exact + 1e-4, torch.Generator())
    assert torch.equal(whole[:3], (exact + 1e-4)[:3])


def test_second_moments_decay():
    """In bfloat16 rounded to the nearest, a second moment times 0.999 is what it was."""
    moving = weight(size=5_000)
    optimizer = optimiser(moving)
    train(moving, optimizer, 1)
    start = optimizer.state[moving]["exp_avg_sq"].float().mean()
    for _ in range(200):
        moving.grad = torch.zeros_like(moving)
        optimizer.step()
    found = optimizer.state[moving]["exp_avg_sq"].float().mean() / start
    assert abs(found - 0.999**200) < 0.02
    assert optimizer.state[moving]["exp_avg_sq"].dtype == torch.bfloat16


def test_in_float32_it_is_torchs_adamw():
    generator = torch.Generator().manual_seed(3)
    ours, theirs = (torch.nn.Parameter(torch.ones(7, 5)) for _ in range(2))
    mine = StochasticAdamW([{"params": [("w", ours)]}], lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2)
    right = torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2)
    for _ in range(5):
        ours.grad = torch.randn(7, 5, generator=generator)
        theirs.grad = ours.grad.clone()
        mine.step(), right.step()
    torch.testing.assert_close(ours, theirs)


def test_the_same_seed_rounds_alike_whatever_else_draws_and_another_differently():
    one, same, other = (weight(size=500) for _ in range(3))
    train(one, optimiser(one, seed=1))
    torch.rand(3)
    train(same, optimiser(same, seed=1))
    train(other, optimiser(other, seed=2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_saved_in_the_middle_it_goes_on_to_the_last_bit():
    straight = weight(size=500)
    optimizer = optimiser(straight)
    train(straight, optimizer, 50)
    kept, state = straight.detach().clone(), copy.deepcopy(optimizer.state_dict())
    train(straight, optimizer, 50)
    again = torch.nn.Parameter(kept)
    resumed = optimiser(again)
    resumed.load_state_dict(state)
    train(again, resumed, 50)
    assert torch.equal(again, straight)
