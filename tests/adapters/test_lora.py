"""LoRA: where it stands, what it computes (by hand), and which weights it trains."""

from __future__ import annotations

import math

import pytest
import torch

from luthier.adapters import lora
from luthier.core.errors import ConfigError
from luthier.model.adapt import AdapterConfig, adapt
from luthier.model.source import ModelConfig
from tests.conftest import build_model

HERE = ModelConfig(model_name_or_path="unused")
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
IDS = torch.arange(10, 42).reshape(2, 16)


def with_lora(model=None, adapter: AdapterConfig | None = None, *, seed: int = 0, where=HERE, **config):
    model = build_model("llama") if model is None else model
    adapter = adapter or AdapterConfig()
    return adapt(model, adapter, lora.Config(**config), model_config=where, trainable=True, seed=seed)


def places(model) -> set[str]:
    """Last names of the modules that carry LoRA matrices."""
    return {name.split(".lora_A.")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if ".lora_A." in name}


def weights(model, name: str):
    held = dict(model.named_parameters())
    found = {part: next(held[key] for key in held if f"{name}.{part}" in key) for part in ("lora_A", "lora_B")}
    return found["lora_A"], found["lora_B"], held[next(key for key in held if f"{name}.base_layer.weight" in key)]


def disturb(model) -> None:
    """Move every trained weight, as training would."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_all_is_every_linear_module_but_the_head():
    model = with_lora()
    assert places(model) == LINEAR
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_all_reaches_the_linear_modules_of_gpt2_too():
    assert places(with_lora(build_model("gpt2"))) == {"c_attn", "c_fc", "c_proj"}


def test_a_head_in_the_place_of_lm_head_is_left_out_of_all():
    model = build_model("llama")
    model.set_output_embeddings(torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Linear(8, 1)))
    adapted = with_lora(model)
    assert places(adapted) == LINEAR


def test_modules_it_does_not_reach_are_pointed_out(caplog):
    """Experts are stacked weights; for DeepSeek peft wraps these and drops the linear modules of the same names."""
    from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3MoeConfig

    from tests.conftest import TINY

    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 2}
    qwen = Qwen3MoeConfig(**TINY, **experts, num_experts=4, head_dim=8)
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    groups = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    deepseek = DeepseekV3Config(**TINY, **experts, **ranks, **groups)
    for config, frozen in (
        (qwen, "model.layers.0.mlp.experts.gate_up_proj"),
        (deepseek, "model.layers.0.mlp.gate_proj"),
    ):
        caplog.clear()
        with caplog.at_level("WARNING", logger="luthier"):
            model = with_lora(AutoModelForCausalLM.from_config(config))
        assert frozen in caplog.text
        held = dict(model.named_parameters())
        name = next(name for name in held if frozen in name)
        assert not held[name].requires_grad and not any(frozen in name and "lora_" in name for name in held)
    caplog.clear()
    with_lora()
    assert not caplog.records


def test_what_peft_refuses_is_said_plainly():
    from transformers import AutoModelForCausalLM, MambaConfig

    config = MambaConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=1, state_size=4, eos_token_id=5, bos_token_id=1
    )
    with pytest.raises(ConfigError, match="LoRA cannot be put on this model.*out_proj"):
        with_lora(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("target", ["q_proj, v_proj", ["q_proj", "v_proj"]])
def test_named_modules(target):
    assert places(with_lora(lora_target=target)) == {"q_proj", "v_proj"}


def test_one_module_by_its_whole_name():
    model = with_lora(lora_target="layers.1.mlp.up_proj")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"base_model.model.model.layers.1.mlp.up_proj.lora_{part}.default.weight" for part in ("A", "B")}


def test_a_name_that_matches_nothing_is_answered_with_what_there_is():
    with pytest.raises(ConfigError, match="lora_target.*'q_prj'.*down_proj, embed_tokens, gate_proj.*q_proj"):
        with_lora(lora_target="v_proj,q_prj")


@pytest.mark.parametrize(
    ("keys", "scale"),
    [
        ({"lora_rank": 4}, 2.0),  # alpha is twice the rank
        ({"lora_rank": 4, "lora_alpha": 4}, 1.0),
        ({"lora_rank": 4, "lora_alpha": 6, "use_rslora": True}, 6 / math.sqrt(4)),
    ],
)
def test_what_a_module_computes(keys, scale):
    model = with_lora(lora_target="layers.0.mlp.up_proj", **keys)
    disturb(model)
    a, b, w = weights(model, "up_proj")
    assert a.shape == (4, 32) and b.shape == (48, 4)
    x = torch.randn(3, 32)
    module = model.get_base_model().model.layers[0].mlp.up_proj
    torch.testing.assert_close(module(x), x @ w.T + scale * (x @ a.T) @ b.T)


def test_dora_trains_direction_and_length_apart():
    model = with_lora(lora_target="layers.0.mlp.up_proj", use_dora=True)
    disturb(model)
    a, b, w = weights(model, "up_proj")
    length = next(p for name, p in model.named_parameters() if "magnitude" in name)
    assert length.shape == (48,)
    direction = w + 2.0 * b @ a
    merged = length[:, None] * direction / direction.norm(dim=1, keepdim=True)
    x = torch.randn(3, 32)
    module = model.get_base_model().model.layers[0].mlp.up_proj
    torch.testing.assert_close(module(x), x @ merged.T)


def test_dropout_drops_in_training_only():
    model = with_lora(lora_dropout=0.5)
    disturb(model)
    with torch.no_grad():
        assert not torch.equal(model(IDS).logits, model(IDS).logits)
        model.eval()
        assert torch.equal(model(IDS).logits, model(IDS).logits)


def test_at_first_nothing_changes():
    with torch.no_grad():
        assert torch.equal(with_lora().eval()(IDS).logits, build_model("llama").eval()(IDS).logits)


def test_the_seed_decides_the_first_weights_and_nothing_else():
    torch.manual_seed(5)
    wanted = torch.rand(2)
    torch.manual_seed(5)
    one = with_lora(build_model("llama"), seed=1)
    torch.manual_seed(5)
    same, other = with_lora(build_model("llama"), seed=1), with_lora(build_model("llama"), seed=2)
    assert torch.equal(weights(one, "q_proj")[0], weights(same, "q_proj")[0])
    assert not torch.equal(weights(one, "q_proj")[0], weights(other, "q_proj")[0])
    model = build_model("llama")
    torch.manual_seed(5)
    with_lora(model, seed=9)
    assert torch.equal(torch.rand(2), wanted)


@pytest.mark.parametrize("upcast", [True, False])
def test_matrices_are_float32_beside_a_frozen_16_bit_model(upcast):
    """With `pure_bf16` too: updates of 1e-5 would vanish, and the matrices are small. Whole modules obey it."""
    adapted = adapt(
        build_model("llama", dtype=torch.bfloat16),
        AdapterConfig(additional_target="lm_head"),
        lora.Config(),
        model_config=HERE,
        trainable=True,
        upcast=upcast,
    )
    held = {
        (parameter.requires_grad, "lora_" in name): parameter.dtype for name, parameter in adapted.named_parameters()
    }
    whole = torch.float32 if upcast else torch.bfloat16
    assert held == {(True, True): torch.float32, (True, False): whole, (False, False): torch.bfloat16}


def test_additional_modules_are_trained_in_full():
    model = with_lora(adapter=AdapterConfig(additional_target="embed_tokens,lm_head"))
    full = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name}
    assert {name.split(".modules_to_save")[0].rsplit(".", 1)[-1] for name in full} == {"embed_tokens", "lm_head"}
    assert places(model) == LINEAR


def test_an_additional_module_that_does_not_exist():
    with pytest.raises(ConfigError, match="additional_target.*'embeddings'"):
        with_lora(adapter=AdapterConfig(additional_target="embeddings"))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_tied_embedding_trained_in_full_stays_tied(kind):
    model = with_lora(
        build_model(kind, tie_word_embeddings=True),
        where=ModelConfig(model_name_or_path="unused", resize_vocab=True),
    )
    full = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    assert [tuple(p.shape) for p in full] == [(400, 32)]
    model(IDS).logits.sum().backward()
    assert full[0].grad is not None
    disturb(model)
    base = model.get_base_model().eval()
    hidden = base.get_decoder()(IDS).last_hidden_state
    torch.testing.assert_close(base(IDS).logits, hidden @ full[0].T)  # the head computes with the trained embedding


@pytest.mark.parametrize(
    "keys", [{"lora_rank": 0}, {"lora_dropout": 1.0}, {"lora_dropout": -0.1}, {"lora_target": " , "}]
)
def test_values_that_make_no_sense(keys):
    with pytest.raises(ConfigError, match=next(iter(keys))):
        lora.Config(**keys)
