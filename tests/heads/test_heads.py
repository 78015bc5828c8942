"""Heads: what they compute, that they come back from disk as they were, and which may start from which."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.special import expit

from luthier.core.errors import ModelError
from luthier.core.types import Encoded, Path
from luthier.data.layout import collate
from luthier.heads.normal import NormalHead
from luthier.model import heads
from luthier.model.policy import PolicySetup
from luthier.objectives.disco_rm import DiscoRmConfig
from tests.conftest import build_model

H = 32
NAMES = ("value", "normal")


def fresh(name, seed=0, keys=None, **changes):
    model = build_model("llama", **changes)
    return model, heads.attach(model, name, keys, seed=seed)


def scramble(head, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return head


def batch_of(lists, pad_id=3, layout="padded"):
    paths = tuple(Path(ids, [0.0] + [1.0] * (len(ids) - 1), score=float(-n)) for n, ids in enumerate(lists))
    return collate([(Encoded(paths), "row")], layout=layout, pad_id=pad_id)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_head_comes_back_bitwise(name, tmp_path):
    model, head = fresh(name, seed=1)
    scramble(head)
    batch = batch_of([[10, 11, 12], [10, 11, 13, 14]])
    before = PolicySetup(model, head=head).bind().verdict(batch)
    heads.save(head, name, tmp_path, {"stage": "rm"})
    twin_model, twin = fresh(name, seed=2)
    after_setup = PolicySetup(twin_model, head=twin)
    assert not torch.equal(after_setup.bind().verdict(batch), before)
    heads.load(twin, name, tmp_path)
    assert torch.equal(after_setup.bind().verdict(batch), before)
    assert json.loads((tmp_path / f"{name}_head.json").read_text()) == {"head": name, "stage": "rm"}


def test_a_value_head_of_llama_factory_is_read(tmp_path):
    """LLaMA-Factory and TRL write value_head.safetensors with these two tensors, and nothing beside it."""
    weight, bias = torch.randn(1, H), torch.randn(1)
    save_file({"v_head.summary.weight": weight, "v_head.summary.bias": bias}, str(tmp_path / "value_head.safetensors"))
    model, head = fresh("value")
    assert heads.saved_in(tmp_path) == "value"
    heads.load(head, "value", tmp_path)
    ids = [20, 21, 22, 23]
    hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    reward = PolicySetup(model, head=head).bind().verdict(batch_of([ids]))
    assert reward.item() == pytest.approx((weight[0] @ hidden + bias[0]).item(), abs=1e-6)


def test_our_value_head_has_the_tensors_that_trl_reads(tmp_path):
    _, head = fresh("value")
    heads.save(head, "value", tmp_path, {})
    stored = load_file(tmp_path / "value_head.safetensors")
    assert {name: tuple(value.shape) for name, value in stored.items()} == {
        "v_head.summary.weight": (1, H),
        "v_head.summary.bias": (1,),
    }


def test_a_value_head_becomes_the_mean_of_a_normal_head(tmp_path, caplog):
    _, value = fresh("value")
    scramble(value)
    heads.save(value, "value", tmp_path, {})
    _, normal = fresh("normal")
    with caplog.at_level("INFO", logger="luthier"):
        heads.load(normal, "normal", tmp_path)
    hidden = torch.randn(5, H)
    mean, variance = normal(hidden).unbind(-1)
    assert torch.equal(mean, value(hidden)[:, 0])
    assert torch.allclose(variance, torch.ones(5), atol=1e-6), "the variance starts fresh"
    said = [r.getMessage() for r in caplog.records if "starts fresh" in r.getMessage()]
    assert len(said) == 1 and "value head" in said[0] and "normal head" in said[0]


def test_a_normal_head_does_not_become_a_value_head(tmp_path):
    _, normal = fresh("normal")
    heads.save(normal, "normal", tmp_path, {})
    _, value = fresh("value")
    with pytest.raises(ModelError, match="holds a normal head, and this run needs a value head"):
        heads.load(value, "value", tmp_path)


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"v_head.summary.weight": torch.ones(1, 8), "v_head.summary.bias": torch.ones(1)}, r"\[1, 8\] instead of"),
        ({"v_head.summary.weight": torch.ones(1, H)}, "summary.bias is missing"),
        (
            {
                "v_head.summary.weight": torch.ones(1, H),
                "v_head.summary.bias": torch.ones(1),
                "v_head.extra": torch.ones(1),
            },
            "extra is unknown",
        ),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_head_that_does_not_fit_says_how(name, tensors, complaint, tmp_path):
    save_file(tensors, str(tmp_path / "value_head.safetensors"))
    _, head = fresh(name)
    before = {key: value.clone() for key, value in head.state_dict().items()}
    if name == "normal" and "missing" in complaint:
        return heads.load(head, name, tmp_path)  # What a normal head does not find starts fresh.
    with pytest.raises(ModelError, match=complaint):
        heads.load(head, name, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())


def test_a_folder_without_a_head(tmp_path):
    _, head = fresh("value")
    assert heads.saved_in(tmp_path) is None
    with pytest.raises(ModelError, match="holds no head"):
        heads.load(head, "value", tmp_path)


@pytest.mark.parametrize("logit", [-1e4, -50.0, 0.0, 50.0, 1e4])
def test_variance_is_positive_and_finite_whatever_the_logit(logit):
    head = NormalHead(1)
    with torch.no_grad():
        head.variance.weight.fill_(1.0)
        head.variance.bias.zero_()
    hidden = torch.tensor([[logit]], requires_grad=True)
    variance = head(hidden)[0, 1]
    expected = 1e-4 + np.logaddexp(0.0, logit)
    assert variance.item() == pytest.approx(expected, rel=1e-5) and variance.item() > 0
    variance.backward()
    assert hidden.grad.item() == pytest.approx(expit(logit), rel=1e-4, abs=1e-30)


@pytest.mark.parametrize("floor", [1e-4, 0.3])
def test_variances_start_at_one_whatever_the_hidden_states(floor):
    head = NormalHead(H, DiscoRmConfig(disco_floor=floor))
    assert torch.allclose(head(torch.randn(7, H) * 100)[:, 1], torch.ones(7), atol=1e-6)


def test_the_floor_travels_with_the_weights(tmp_path):
    _, head = fresh("normal", keys=DiscoRmConfig(disco_floor=0.25))
    with torch.no_grad():
        head.variance.bias.fill_(-1e4)
    heads.save(head, "normal", tmp_path, {})
    _, without_keys = fresh("normal")
    heads.load(without_keys, "normal", tmp_path)
    assert without_keys(torch.zeros(1, H))[0, 1].item() == 0.25
    _, same = fresh("normal", keys=DiscoRmConfig(disco_floor=0.25))
    heads.load(same, "normal", tmp_path)
    _, other = fresh("normal", keys=DiscoRmConfig())
    with pytest.raises(ModelError, match="Set disco_floor: 0.25"):
        heads.load(other, "normal", tmp_path)


def test_dropout_is_in_front_of_the_variance_only_and_only_while_training():
    head = scramble(NormalHead(H, DiscoRmConfig(disco_dropout=0.5)))
    hidden = torch.randn(4, H)
    head.train()
    torch.manual_seed(0)
    first, second = head(hidden), head(hidden)
    assert torch.equal(first[:, 0], second[:, 0])
    assert not torch.equal(first[:, 1], second[:, 1])
    head.eval()
    assert torch.equal(head(hidden), head(hidden))
    softplus = torch.log1p(torch.exp(head.variance(hidden)[:, 0].double()))
    assert torch.allclose(head(hidden)[:, 1].double(), softplus + 1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_heads_are_float32_on_a_bfloat16_model(name):
    model, head = fresh(name, dtype=torch.bfloat16)
    verdict = PolicySetup(model, head=head).bind().verdict(batch_of([[10, 11, 12]]))
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    assert verdict.dtype == torch.float32 and verdict.shape == (1, head.width)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_the_verdict_is_read_at_the_last_real_token_also_when_padding_is_eos(name, layout):
    """Answers end in eos (5), padding is eos too, and one answer holds eos in its middle."""
    model, head = fresh(name)
    scramble(head)
    lists = [[10, 11, 12, 5], [10, 11, 5, 13, 14, 15, 5], [10, 5]]
    found = PolicySetup(model, head=head).bind().verdict(batch_of(lists, pad_id=5, layout=layout))
    for ids, row in zip(lists, found):
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[:, -1]
        assert torch.allclose(row, head(hidden)[0], atol=1e-5)


def test_mean_and_variance_of_every_token():
    model, head = fresh("normal")
    scramble(head)
    ids = [10, 11, 12, 13, 5]
    batch = batch_of([ids])
    policy = PolicySetup(model, head=head).bind()
    tokens = policy.verdict_at_tokens(batch)
    assert tokens.shape == (4, 2) and (tokens[:, 1] > 0).all()
    assert torch.allclose(tokens[-1], policy.verdict(batch)[0])
    hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, 1:]
    assert torch.allclose(tokens, head(hidden), atol=1e-5)


def test_softplus_of_the_starting_bias():
    assert NormalHead(H).variance.bias.item() == pytest.approx(math.log(math.expm1(1 - 1e-4)))
    assert NormalHead(H).variance.bias.item() == pytest.approx(0.5413, abs=2e-4)
