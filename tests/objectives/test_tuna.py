"""Tuna against a double loop over the pairs of plain forward passes, closed forms, and torch's MarginRankingLoss."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.exact.conftest import gradients
from tests.objectives.lists import LAYOUTS, Told, double_model, furthest, lists, luthier_loss, plain_logps, told

from luthier.core.errors import ConfigError
from luthier.core.registry import find
from luthier.core.types import Encoded
from luthier.data.renderer import make_renderer
from luthier.data.source import COLUMNS, Columns
from luthier.data.template import TemplateConfig
from luthier.objectives.sft import Sft
from luthier.objectives.tuna import Tuna, TunaConfig

RAGGED = ([3.0, 1.5, 0.5, -1.0], [0.0, 1.0], [2.0, 5.0, 1.0], [1.0, 0.0, -1.0, -2.0, -4.0])


def tuna(**keys):
    return Tuna(TunaConfig(**keys))


def by_loops(model, items, *, margin=0.1, weight=1.0, norm="mean", reduction="sum", mle_on="all"):
    """Two loops over ranks for every list; then the cross-entropy, token by token."""
    ranking, tokens = 0.0, []
    for encoded, _ in items:
        answers = plain_logps(model, encoded)
        tokens += [logp for answer in (answers if mle_on == "all" else answers[:1]) for logp in answer]
        s = [sum(answer) / (len(answer) if norm == "mean" else 1) for answer in answers]
        for apart in range(1, len(s)):
            hinges = [torch.relu(s[a + apart] - s[a] + margin * apart) for a in range(len(s) - apart)]
            ranking = ranking + sum(hinges) / len(hinges) / (1 if reduction == "sum" else len(s) - 1)
    return weight * -sum(tokens) / len(tokens) + ranking / len(items)


VARIANTS = [
    {},
    {"tuna_margin": 0.3, "tuna_mle_weight": 0.5, "mle_on": "best"},
    {"tuna_norm": "sum", "tuna_reduction": "mean"},
    {"tuna_reduction": "mean", "tuna_mle_weight": 0.0, "mle_on": "best"},
]


NAMES = {
    "tuna_margin": "margin",
    "tuna_mle_weight": "weight",
    "tuna_norm": "norm",
    "tuna_reduction": "reduction",
    "mle_on": "mle_on",
}
"""Keys -> arguments of `by_loops`."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keys", VARIANTS)
def test_loss_and_gradients_are_those_of_the_loops(layout, keys):
    model, items = double_model(), lists(*RAGGED)
    expected = by_loops(model, items, **{NAMES[key]: value for key, value in keys.items()})
    loss, found = luthier_loss(tuna(**keys), model, items, layout)
    assert loss == pytest.approx(expected.item(), abs=1e-9)
    assert furthest(found, gradients(model, expected)) < 1e-9


@pytest.mark.parametrize("keys", VARIANTS)
def test_it_is_exact_however_a_step_is_cut(keys):
    model, items = double_model(), lists(*RAGGED)
    whole, wanted = luthier_loss(tuna(**keys), model, items)
    for cut in ([1, 3], [2, 0, 2], [1, 1, 1, 1]):
        loss, found = luthier_loss(tuna(**keys), model, items, "shared", cut=cut)
        assert loss == pytest.approx(whole, abs=1e-9)
        assert furthest(found, wanted) < 1e-9


def test_the_authors_code_agrees():
    """Their loop over rank distances with torch's own loss, on a [batch, K] table."""
    s = torch.tensor([[-1.0, -1.5, -0.7, -2.0], [-0.3, -0.9, -1.1, -0.2]], dtype=torch.float64)
    expected = -s.mean()
    for apart in range(1, 4):
        better, worse = s[:, :-apart], s[:, apart:]
        expected = expected + torch.nn.MarginRankingLoss(0.1 * apart)(better, worse, torch.ones_like(better))
    loss, _ = tuna().loss(Told(s.flatten()), told([[3.0, 1.5, 0.5, -1.0]] * 2))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)


def test_two_answers_are_one_hinge():
    s = torch.tensor([-1.3, -0.4], dtype=torch.float64)
    loss, logs = tuna(tuna_margin=0.25, tuna_mle_weight=2.0).loss(Told(s), told([[3.0, 1.5]]))
    assert logs["ranking_loss"].item() == pytest.approx(0.9 + 0.25, abs=1e-12)
    assert logs["mle_loss"].item() == pytest.approx(0.85, abs=1e-12)
    assert loss.item() == pytest.approx(2 * 0.85 + 1.15, abs=1e-12)


def test_three_answers_by_hand():
    s = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    # One apart: max(0, -1 + .1) and 1.5 + .1, averaged; two apart: 0.5 + .2.
    for reduction, expected in (("sum", 0.8 + 0.7), ("mean", (0.8 + 0.7) / 2)):
        _, logs = tuna(tuna_reduction=reduction).loss(Told(s), told([[9.0, 3.0, 1.0]]))
        assert logs["ranking_loss"].item() == pytest.approx(expected, abs=1e-12)


def test_a_list_in_order_by_more_than_the_margin_has_no_ranking_loss():
    s = torch.tensor([-1.0, -1.2, -1.4], dtype=torch.float64)
    for margin, expected in ((0.0, 0.0), (0.19, 0.0), (0.3, 0.1 + 0.2)):
        _, logs = tuna(tuna_margin=margin).loss(Told(s), told([[3.0, 2.0, 1.0]]))
        assert logs["ranking_loss"].item() == pytest.approx(expected, abs=1e-12)


def test_equal_scores_share_a_rank_whatever_their_order():
    # Ranks 0, 0, 1, 2: one apart are (a, c), (b, c), (c, d); two apart (a, d), (b, d); a and b are no pair.
    s = {"a": -1.0, "b": -0.3, "c": -0.8, "d": -0.9}
    marks = {"a": 3.0, "b": 3.0, "c": 2.0, "d": 1.0}
    one = (s["c"] - s["a"] + 0.5 + max(0, s["c"] - s["b"] + 0.5) + s["d"] - s["c"] + 0.5) / 3
    two = (s["d"] - s["a"] + 1.0 + s["d"] - s["b"] + 1.0) / 2
    for order in itertools.permutations(s):
        values = torch.tensor([s[name] for name in order], dtype=torch.float64)
        batch = told([[marks[name] for name in order]])
        for reduction, expected in (("sum", one + two), ("mean", (one + two) / 2)):
            _, logs = tuna(tuna_margin=0.5, tuna_reduction=reduction).loss(Told(values), batch)
            assert logs["ranking_loss"].item() == pytest.approx(expected, abs=1e-12)


def test_gradcheck():
    batch = told([[3.0, 1.5, 0.5, -1.0], [1.0, 0.0], [2.0, 2.0, 1.0]])
    s = -torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    assert torch.autograd.gradcheck(lambda values: tuna().loss(Told(values), batch)[0], s.requires_grad_())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_imitating_the_best_alone_is_sft_on_it(layout):
    """With margin 0 and everything in order nothing else is left; here the ranking loss is subtracted."""
    model, items = double_model(), lists(*RAGGED)
    best = [(Encoded((max(encoded.paths, key=lambda path: path.score),)), name) for encoded, name in items]
    with_mle, _ = luthier_loss(tuna(mle_on="best"), model, items, layout, cut=[1, 2, 1])
    without, _ = luthier_loss(tuna(mle_on="best", tuna_mle_weight=0.0), model, items, layout)
    assert with_mle - without == pytest.approx(luthier_loss(Sft(), model, best)[0], abs=1e-9)


def test_pairs_of_chosen_and_rejected_are_lists_of_two(tokenizer):
    columns = Columns({**COLUMNS, "chosen": "chosen", "rejected": "rejected"}, ranking=True)
    row = {"instruction": "hello", "chosen": "a violin maker", "rejected": "no"}
    renderer = make_renderer(TemplateConfig(template="chatml"), tokenizer)
    found = tuna().encode(find("formats", "alpaca").read(row, columns), renderer, cutoff_len=64)
    items, model = [(encoded, "row") for encoded in found], double_model()
    assert luthier_loss(tuna(), model, items)[0] == pytest.approx(by_loops(model, items).item(), abs=1e-9)


def test_what_is_measured():
    s = torch.tensor([-1.0, -2.0, -0.5, -3.0, -3.5], dtype=torch.float64)
    _, logs = tuna().loss(Told(s), told([[3.0, 2.0, 1.0], [1.0, 0.0]]))
    assert logs["ranking_accuracy"].item() == pytest.approx((1 / 3 + 1) / 2)
    assert logs["best_first"].item() == pytest.approx(1 / 2)
    assert logs["best_logp"].item() == pytest.approx(-2.0)


@pytest.mark.parametrize("key", ["tuna_margin", "tuna_mle_weight"])
@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_keys_that_make_no_sense(key, value):
    with pytest.raises(ConfigError, match=f"{key}: {value} must be 0 or more"):
        tuna(**{key: value}).start(None)
