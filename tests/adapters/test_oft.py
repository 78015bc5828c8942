"""OFT: which modules are turned, what a turned module computes (by hand), and what is saved and merged."""

from __future__ import annotations

import pytest
import torch

from luthier.adapters import oft
from luthier.core.errors import ConfigError
from luthier.model.adapt import AdapterConfig, adapt, attach, merge
from luthier.model.source import ModelConfig
from tests.conftest import build_model

HERE = ModelConfig(model_name_or_path="unused")
IDS = torch.arange(10, 42).reshape(2, 16)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def turned(model=None, adapter=None, **keys):
    adapter = adapter or AdapterConfig(finetuning_type="oft")
    config = oft.Config(**{"oft_block_size": 16} | keys)
    return adapt(model or build_model("llama"), adapter, config, model_config=HERE, trainable=True)


def disturb(model) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def free(model) -> dict[str, torch.Size]:
    return {
        name.split(".oft_R")[0].rsplit(".", 1)[-1]: p.shape for name, p in model.named_parameters() if p.requires_grad
    }


def test_at_first_nothing_turns():
    assert torch.equal(logits(turned()), logits(build_model("llama")))


def test_oft_target_is_honoured():
    assert set(free(turned(oft_target="q_proj,down_proj"))) == {"q_proj", "down_proj"}
    assert set(free(turned())) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    with pytest.raises(ConfigError, match="oft_target.*'q_prj'"):
        turned(oft_target="q_prj")


@pytest.mark.parametrize(
    ("keys", "blocks", "rows"),
    [({"oft_block_size": 8}, 4, 8), ({"oft_block_size": 32}, 1, 32), ({"oft_rank": 2, "oft_block_size": 0}, 2, 16)],
)
def test_how_many_blocks_of_what_size(keys, blocks, rows):
    """A rotation of n rows is n (n - 1) / 2 numbers."""
    assert free(turned(oft_target="q_proj", **keys))["q_proj"] == (blocks, rows * (rows - 1) // 2)


def test_a_module_turns_its_input_block_by_block():
    model = turned(oft_target="layers.0.mlp.up_proj", oft_block_size=16)
    disturb(model)
    module = model.get_base_model().model.layers[0].mlp.up_proj
    numbers = module.oft_R["default"].weight.detach().double()
    blocks = []
    for row in numbers:
        q = torch.zeros(16, 16, dtype=torch.float64)
        q[tuple(torch.triu_indices(16, 16, 1))] = row
        q = q - q.T
        blocks.append(torch.linalg.solve(torch.eye(16) - q, torch.eye(16) + q))
    rotation = torch.block_diag(*blocks)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-9)
    x = torch.randn(3, 32, dtype=torch.float64)
    w = module.base_layer.weight.detach().double()
    found = module(x.float()).double()
    # peft sums five terms of the series of the inverse; either direction of turning is a rotation.
    errors = [(found - x @ turn @ w.T).abs().max() for turn in (rotation, rotation.T)]
    assert min(errors) < 0.05 * (found - x @ w.T).abs().max()


def test_saved_loaded_gone_on_with_and_merged(tmp_path):
    model = turned(adapter=AdapterConfig(finetuning_type="oft", additional_target="lm_head"))
    disturb(model)
    model.save_pretrained(tmp_path)
    wanted = logits(model)
    assert (wanted - logits(build_model("llama"))).abs().max() > 0.05
    given = AdapterConfig(finetuning_type="oft", adapter_name_or_path=str(tmp_path))
    again = adapt(build_model("llama"), given, oft.Config(), model_config=HERE, trainable=True)
    assert torch.equal(logits(again), wanted)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    merged = merge(attach(build_model("llama"), tmp_path).eval())
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-5, atol=1e-5)


def test_what_it_cannot_stand_on():
    with pytest.raises(ConfigError, match="oft_target: OFT cannot be put on this model.*Conv1D"):
        turned(build_model("gpt2"))
    with pytest.raises(ConfigError, match="additional_target: embedding and head"):
        turned(
            build_model("llama", tie_word_embeddings=True),
            AdapterConfig(finetuning_type="oft", additional_target="embed_tokens"),
        )


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"oft_rank": 4}, "oft_block_size: 0 to set oft_rank"),
        ({"oft_block_size": 0}, "one of them must be above 0"),
        ({"oft_target": ""}, "oft_target is empty"),
    ],
)
def test_keys_that_make_no_rotation(keys, words):
    with pytest.raises(ConfigError, match=words):
        oft.Config(**keys)
