"""The load-balancing loss of a mixture of experts: transformers' own, padding left out, in training alone."""

from __future__ import annotations

import pytest
import torch
import transformers

from luthier.adapters import lora
from luthier.core.errors import ModelError
from luthier.core.types import Encoded, Path
from luthier.data.layout import collate
from luthier.model.adapt import AdapterConfig, adapt
from luthier.model.policy import PolicySetup
from luthier.model.source import ModelConfig
from luthier.objectives.sft import Sft
from luthier.train import by_hand
from tests.conftest import TINY, build_model

EXPERTS = {"num_experts_per_tok": 2, "num_key_value_heads": 2, "pad_token_id": 3}
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**TINY, **EXPERTS, num_local_experts=4),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **TINY, **EXPERTS, num_experts=4, moe_intermediate_size=16, head_dim=8
    ),
}
PATHS = [Path([9, 8, 7, 11, 12, 13], [0.0, 0, 1, 1, 1, 1]), Path([30, 31, 20, 21], [0.0, 0, 1, 1])]
ITEMS = [(Encoded((path,)), f"row {number}") for number, path in enumerate(PATHS)]


def mixture(kind: str, coefficient: float = 0.5):
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    config.router_aux_loss_coef = coefficient
    return transformers.AutoModelForCausalLM.from_config(config).train()


def batch_of(items=ITEMS, layout="padded"):
    return collate(items, layout=layout, pad_id=3)


def theirs(model) -> torch.Tensor:
    """transformers' own loss of the two rows, padded on the right."""
    ids = torch.tensor([PATHS[0].ids, PATHS[1].ids + [3, 3]])
    labels = torch.tensor([[-100, -100, 7, 11, 12, 13], [-100, -100, 20, 21, -100, -100]])
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    return model(input_ids=ids, attention_mask=mask, labels=labels, output_router_logits=True).loss


def ours(model, batch, coefficient=0.5) -> torch.Tensor:
    policy = PolicySetup(model, router=coefficient).bind()
    return Sft().loss(policy, batch)[0] + policy.router_loss(batch)


@pytest.mark.parametrize("kind", CONFIGS)
def test_loss_and_gradients_are_transformers_own(kind):
    model, other = mixture(kind), mixture(kind)
    wanted, found = theirs(other), ours(model, batch_of())
    torch.testing.assert_close(found, wanted)
    wanted.backward(), found.backward()
    for (name, one), two in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6, msg=name)
    plain = PolicySetup(mixture(kind)).bind()
    assert (found - Sft().loss(plain, batch_of())[0]).abs() > 0.1, "the router's loss is part of it"


def test_the_loop_by_hand_trains_it_too():
    model, other = mixture("mixtral"), mixture("mixtral")
    wanted = theirs(other)
    wanted.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (loss,) = by_hand.train(PolicySetup(model, router=0.5), Sft(), [[batch_of()]], optimizer)
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    for (name, moved), began in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(moved, began - 0.1 * began.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_micro_batches_share_it_by_their_examples():
    model = mixture("mixtral")
    totals = batch_of().units()
    parts = []
    for items in (ITEMS[:1], ITEMS[1:]):
        batch = batch_of(items).with_totals(totals)
        parts.append(PolicySetup(model, router=0.5).bind().router_loss(batch))
    whole = [PolicySetup(model, router=0.5).bind().router_loss(batch_of(items)) for items in (ITEMS[:1], ITEMS[1:])]
    torch.testing.assert_close(parts[0] + parts[1], (whole[0] + whole[1]) / 2)


def test_with_an_adapter_on_top():
    keys = lora.Config(lora_target="q_proj")
    here = ModelConfig(model_name_or_path="unused")
    model = adapt(mixture("mixtral"), AdapterConfig(), keys, model_config=here, trainable=True)
    torch.testing.assert_close(ours(model, batch_of()), theirs(mixture("mixtral")))


def test_evaluation_and_no_weight_leave_it_out():
    model = mixture("mixtral")
    assert PolicySetup(model).bind().router_loss(batch_of()) is None
    assert PolicySetup(model.eval(), router=0.5).bind().router_loss(batch_of()) is None


def test_what_it_cannot_be_computed_for():
    policy = PolicySetup(mixture("mixtral"), router=0.5).bind()
    with pytest.raises(ModelError, match="needs padded rows, and these are packed"):
        policy.router_loss(batch_of(layout="packed"))
    with pytest.raises(ModelError, match="moe_aux_loss_coef: LlamaForCausalLM is no mixture"):
        PolicySetup(build_model("llama"), router=0.5)
