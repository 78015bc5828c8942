"""Which weights full and freeze fine-tuning free, against sets of names written out by hand."""

from __future__ import annotations

import pytest
import torch

from luthier.adapters import freeze, full, lora
from luthier.core.errors import ConfigError
from luthier.model.adapt import AdapterConfig, adapt, count_parameters
from luthier.model.source import ModelConfig
from tests.conftest import build_model

ATTENTION = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
MLP = {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
NORMS = {"input_layernorm.weight", "post_attention_layernorm.weight"}
OUTSIDE = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
HERE = ModelConfig(model_name_or_path="unused")


def layer(*numbers: int, parts: set[str] = ATTENTION | MLP | NORMS) -> set[str]:
    return {f"model.layers.{number}.{part}" for number in numbers for part in parts}


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen_llama(layers: int = 4, **config):
    model = build_model("llama", num_hidden_layers=layers)
    adapter = AdapterConfig(finetuning_type="freeze")
    return adapt(model, adapter, freeze.Config(**config), model_config=HERE, trainable=True)


def test_full_trains_everything():
    model = build_model("llama").requires_grad_(False)
    adapted = adapt(model, AdapterConfig(finetuning_type="full"), full.Config(), model_config=HERE, trainable=True)
    assert trained(adapted) == layer(0, 1) | OUTSIDE
    assert adapted.training


@pytest.mark.parametrize(
    ("count", "numbers"), [(2, (2, 3)), (1, (3,)), (-1, (0,)), (-3, (0, 1, 2)), (4, (0, 1, 2, 3)), (9, (0, 1, 2, 3))]
)
def test_the_last_n_layers_or_the_first(count, numbers):
    assert trained(frozen_llama(freeze_trainable_layers=count)) == layer(*numbers)


def test_the_default_is_the_last_two_layers_whole():
    assert trained(frozen_llama()) == layer(2, 3)


@pytest.mark.parametrize("modules", ["mlp, input_layernorm", ["mlp", "input_layernorm"]])
def test_only_some_modules_of_the_layers(modules):
    expected = layer(2, 3, parts=MLP | {"input_layernorm.weight"})
    assert trained(frozen_llama(freeze_trainable_modules=modules)) == expected


def test_modules_outside_the_layers_too():
    model = frozen_llama(freeze_trainable_layers=1, freeze_extra_modules="norm,lm_head")
    assert trained(model) == layer(3) | {"model.norm.weight", "lm_head.weight"}


def test_only_modules_outside_the_layers():
    assert trained(frozen_llama(freeze_trainable_layers=0, freeze_extra_modules="lm_head")) == {"lm_head.weight"}


def test_layers_are_counted_not_read_from_names():
    """Layer 1 of twelve is not layer 11, which a search for names would mix up."""
    assert trained(frozen_llama(12, freeze_trainable_layers=1)) == layer(11)
    assert trained(frozen_llama(12, freeze_trainable_layers=-2)) == layer(0, 1)


def test_a_tied_head_is_trained_as_the_embedding_it_is():
    model = build_model("llama", tie_word_embeddings=True)
    config = freeze.Config(freeze_trainable_layers=0, freeze_extra_modules="lm_head")
    adapted = adapt(model, AdapterConfig(finetuning_type="freeze"), config, model_config=HERE, trainable=True)
    assert trained(adapted) == {"model.embed_tokens.weight"}


def test_additional_target_counts_for_freeze_too():
    model = build_model("llama")
    adapter = AdapterConfig(finetuning_type="freeze", additional_target="embed_tokens")
    adapted = adapt(model, adapter, freeze.Config(freeze_trainable_layers=1), model_config=HERE, trainable=True)
    assert trained(adapted) == layer(1) | {"model.embed_tokens.weight"}


def test_gpt2_has_its_layers_elsewhere():
    config = freeze.Config(freeze_trainable_layers=1, freeze_trainable_modules="ln_1")
    adapted = adapt(
        build_model("gpt2"), AdapterConfig(finetuning_type="freeze"), config, model_config=HERE, trainable=True
    )
    assert trained(adapted) == {"transformer.h.1.ln_1.weight", "transformer.h.1.ln_1.bias"}


def test_names_that_do_not_exist_are_answered_with_those_that_do():
    choices = "all, input_layernorm, mlp, post_attention_layernorm, self_attn"
    with pytest.raises(ConfigError, match=f"no module named 'ml'.*{choices}"):
        frozen_llama(freeze_trainable_modules="ml")
    with pytest.raises(ConfigError, match="freeze_extra_modules.*'norms'.*embed_tokens, lm_head, norm"):
        frozen_llama(freeze_extra_modules="norms")


def test_training_nothing_is_an_error():
    with pytest.raises(ConfigError, match="Nothing would be trained"):
        frozen_llama(freeze_trainable_layers=0)


@pytest.mark.parametrize(("upcast", "expected"), [(True, torch.float32), (False, torch.bfloat16)])
def test_trained_weights_are_float32_and_frozen_ones_stay(upcast, expected):
    model = build_model("llama", dtype=torch.bfloat16)
    adapter = AdapterConfig(finetuning_type="freeze")
    config = freeze.Config(freeze_trainable_layers=1)
    adapted = adapt(model, adapter, config, model_config=HERE, trainable=True, upcast=upcast)
    held = {name: parameter.dtype for name, parameter in adapted.named_parameters()}
    assert {held[name] for name in layer(1)} == {expected}
    assert {held[name] for name in layer(0) | OUTSIDE} == {torch.bfloat16}


def test_double_precision_is_kept():
    model = build_model("llama", dtype=torch.float64)
    adapted = adapt(model, AdapterConfig(finetuning_type="full"), full.Config(), model_config=HERE, trainable=True)
    assert {parameter.dtype for parameter in adapted.parameters()} == {torch.float64}


def test_shared_weights_are_counted_once():
    # 400 x 32 embedding, shared; per layer 2 norms of 32, q and o 32 x 32, k and v 16 x 32, three 32 x 48; last norm 32
    per_layer = 2 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48
    total = 400 * 32 + 2 * per_layer + 32
    model = build_model("llama", tie_word_embeddings=True)
    config = freeze.Config(freeze_trainable_layers=1)
    adapted = adapt(model, AdapterConfig(finetuning_type="freeze"), config, model_config=HERE, trainable=True)
    count = count_parameters(adapted)
    assert (count.trainable, count.total) == (per_layer, total)
    assert f"{per_layer:,} of {total:,}" in str(count)


@pytest.mark.parametrize("method", [full, lora])
def test_keys_of_models_that_read_images_are_said_to_be_idle_on_others(caplog, method):
    kind = method.__name__.rpartition(".")[2]
    changed = {"freeze_language_model": True, "freeze_vision_tower": False}
    with caplog.at_level("WARNING", logger="luthier"):
        for keys in ({}, changed):
            config = AdapterConfig(finetuning_type=kind, **keys)
            adapt(build_model("llama"), config, method.Config(), model_config=HERE, trainable=True)
    said = sorted(record.getMessage() for record in caplog.records)
    assert said == [f"{key} has no effect: the model reads no images." for key in changed]


def test_every_parameter_can_be_listed(caplog):
    listing = ModelConfig(model_name_or_path="unused", print_param_status=True)
    config = freeze.Config(freeze_trainable_layers=1)
    adapter = AdapterConfig(finetuning_type="freeze")
    with caplog.at_level("INFO", logger="luthier"):
        adapt(build_model("llama"), adapter, config, model_config=listing, trainable=True)
    lines = [record.getMessage() for record in caplog.records]
    assert any("model.layers.1.mlp.up_proj.weight" in line and "trained" in line for line in lines)
    assert any("model.layers.0.mlp.up_proj.weight" in line and "frozen" in line for line in lines)
