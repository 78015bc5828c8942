"""luthier expand: the deeper model says what the model said, and training moves the new layers alone."""

from __future__ import annotations

import pytest
import torch

from luthier.adapters import freeze, lora
from luthier.core.errors import ConfigError, ModelError
from luthier.expand import deepen, expand
from luthier.export import ExportConfig
from luthier.model.adapt import AdapterConfig, adapt
from luthier.model.load import load_model
from luthier.model.source import ModelConfig
from tests.conftest import TINY, build_model, build_tokenizer

IDS = torch.arange(10, 42).reshape(2, 16)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def model_of(kind):
    import transformers

    if kind != "mixtral":
        return build_model(
            kind, **({"n_layer": 4} if kind == "gpt2" else {"num_hidden_layers": 4} | LAYERS.get(kind, {}))
        )
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **TINY | {"num_hidden_layers": 4}, num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2
    )
    return transformers.AutoModelForCausalLM.from_config(config)


KINDS = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
LAYERS = {"qwen3": {"layer_types": KINDS}, "gemma3": {"layer_types": KINDS}}


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma3", "gpt2", "mixtral"])
def test_new_layers_copy_the_one_before_and_change_nothing(kind):
    model = model_of(kind)
    deeper = deepen(model, 2)
    assert deeper.config.num_hidden_layers == 6 and model.config.num_hidden_layers == 4
    torch.testing.assert_close(logits(deeper), logits(model), rtol=1e-5, atol=1e-6)
    for index, source in enumerate([0, 1, 1, 2, 3, 3]):
        stacks = [m.transformer.h if kind == "gpt2" else m.model.layers for m in (deeper, model)]
        pairs = list(zip(stacks[0][index].parameters(), stacks[1][source].parameters()))
        same = [torch.equal(one, other) for one, other in pairs]
        assert all(same) if index not in (2, 5) else not all(same) and any(same)
    if kind in LAYERS:
        assert deeper.config.layer_types == [KINDS[source] for source in [0, 1, 1, 2, 3, 3]]


def test_new_layers_learn():
    """Zero on both sides of a product would never move."""
    deeper = deepen(model_of("llama"), 2)
    deeper(IDS, labels=IDS).loss.backward()
    grown = [deeper.model.layers[index] for index in (2, 5)]
    assert all(layer.mlp.down_proj.weight.grad.any() and layer.self_attn.o_proj.weight.grad.any() for layer in grown)


@pytest.mark.parametrize(("kind", "keys"), [("freeze", freeze.Config), ("lora", lora.Config)])
def test_use_llama_pro_trains_the_new_layers_alone(kind, keys):
    here = ModelConfig(model_name_or_path="unused")
    config = keys(use_llama_pro=True, freeze_trainable_layers=2)
    model = adapt(
        deepen(model_of("llama"), 2), AdapterConfig(finetuning_type=kind), config, model_config=here, trainable=True
    )
    moved = {name.split("layers.")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert moved == {"2", "5"}


def test_layers_that_cannot_be_cut_so():
    with pytest.raises(
        ConfigError, match="--blocks 3: the 4 layers cannot be cut into 3 equal runs. Possible are 1, 2, 4"
    ):
        deepen(model_of("llama"), 3)
    here = ModelConfig(model_name_or_path="unused")
    config = freeze.Config(use_llama_pro=True, freeze_trainable_layers=3)
    with pytest.raises(ConfigError, match="freeze_trainable_layers: with use_llama_pro .* 4 layers .* 3 equal runs"):
        adapt(model_of("llama"), AdapterConfig(finetuning_type="freeze"), config, model_config=here, trainable=True)


def test_freeze_trainable_layers_without_expanded_blocks_is_pointed_out(caplog):
    here = ModelConfig(model_name_or_path="unused")
    with caplog.at_level("WARNING", logger="luthier"):
        keys = lora.Config(freeze_trainable_layers=3)
        adapt(build_model("llama"), AdapterConfig(), keys, model_config=here, trainable=True)
    assert "freeze_trainable_layers has no effect" in caplog.text


def saved(folder):
    model_of("llama").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return ModelConfig(model_name_or_path=str(folder))


def test_the_verb_saves_a_model_that_any_program_loads(tmp_path):
    from luthier.cli import main

    base = saved(tmp_path / "base")
    out = tmp_path / "deeper"
    assert main(["expand", f"model_name_or_path={base.model_name_or_path}", "--blocks", "2", f"export_dir={out}"]) == 0
    again = load_model(ModelConfig(model_name_or_path=str(out)))
    assert again.config.num_hidden_layers == 6
    torch.testing.assert_close(logits(again), logits(load_model(base)), rtol=1e-5, atol=1e-6)
    assert main(["expand", f"model_name_or_path={out}", "--blocks", "5", f"export_dir={tmp_path / 'no'}"]) == 2
    assert not (tmp_path / "no").exists()


def test_layers_that_are_not_idle_are_not_saved(tmp_path, monkeypatch):
    from luthier import expand as module

    monkeypatch.setattr(module, "_idle", lambda name, tensor: tensor)
    with pytest.raises(ModelError, match="not idle: logits differ"):
        expand(saved(tmp_path / "base"), ExportConfig(export_dir=str(tmp_path / "out")), 2)
    assert not (tmp_path / "out").exists()
