"""PiSSA: the start it makes, the adapter it leaves behind, and that no later step forgets what was taken apart."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from luthier.adapters import lora
from luthier.core.errors import ConfigError, ModelError
from luthier.model import pissa
from luthier.model.adapt import AdapterConfig, adapt, sidecars
from luthier.model.source import ModelConfig
from tests.conftest import build_model

HERE = ModelConfig(model_name_or_path="unused")
IDS = torch.arange(10, 42).reshape(2, 16)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def begin(kind="llama", adapter=None, seed=0, **config):
    keys = lora.Config(**{"lora_rank": 4, "pissa_init": True} | config)
    return adapt(build_model(kind), adapter or AdapterConfig(), keys, model_config=HERE, trainable=True, seed=seed)


def disturb(model, seed=1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)


def trained(folder, adapter=None, **config) -> torch.Tensor:
    """A trained PiSSA adapter in `folder`, as a run saves it; returns what it says."""
    adapter = adapter or AdapterConfig()
    model = begin(adapter=adapter, **config)
    write = sidecars(model, adapter, HERE)
    disturb(model)
    save(model, folder, write)
    return logits(model)


def save(model, folder, write) -> None:
    model.save_pretrained(folder)
    for one in write:
        one(folder)


def module_of(model):
    return model.get_base_model().model.layers[0].mlp.up_proj


def test_it_starts_from_the_largest_singular_vectors():
    model = begin(pissa_iter=-1, lora_target="layers.0.mlp.up_proj")
    plain = build_model("llama").model.layers[0].mlp.up_proj.weight.detach()
    u, s, v = torch.linalg.svd(plain, full_matrices=False)
    largest = u[:, :4] * s[:4] @ v[:4]
    module = module_of(model)
    product = module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
    torch.testing.assert_close(product, largest, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.base_layer.weight, plain - largest, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model), logits(build_model("llama")), rtol=1e-5, atol=1e-5)


def test_fewer_rounds_are_less_exact():
    """`pissa_iter` reaches the decomposition."""

    def rest(iterations):
        model = begin(pissa_iter=iterations, lora_target="layers.0.mlp.up_proj")
        return torch.linalg.matrix_norm(module_of(model).base_layer.weight)

    assert rest(1) > rest(16) > rest(-1) > 0.95 * rest(16)


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"adapter": AdapterConfig(additional_target="lm_head")}])
def test_converted_it_works_on_the_unmodified_model_by_peft_alone(tmp_path, more):
    from peft import PeftModel

    wanted = trained(tmp_path, **more)
    assert (wanted - logits(build_model("llama"))).abs().max() > 0.1
    pissa.convert(tmp_path)
    converted = PeftModel.from_pretrained(build_model("llama"), str(tmp_path / "pissa_converted"))
    torch.testing.assert_close(logits(converted), wanted, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "pissa_converted" / "adapter_config.json").read_text())["r"] == 8


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_unconverted_it_is_loaded_with_what_it_was_trained_beside(tmp_path, kind):
    model = begin(kind)
    write = sidecars(model, AdapterConfig(), HERE)
    disturb(model)
    save(model, tmp_path, write)
    wanted = logits(model)
    given = AdapterConfig(adapter_name_or_path=str(tmp_path))
    again = adapt(build_model(kind), given, lora.Config(), model_config=HERE, trainable=True, seed=5)
    assert torch.equal(logits(again), wanted)
    merged = adapt(build_model(kind), given, lora.Config(), model_config=HERE, trainable=False)
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-5, atol=1e-5)


def test_training_may_go_on_and_the_start_stays_the_same(tmp_path):
    trained(tmp_path / "one")
    given = AdapterConfig(adapter_name_or_path=str(tmp_path / "one"))
    model = adapt(build_model("llama"), given, lora.Config(), model_config=HERE, trainable=True)
    write = sidecars(model, given, HERE)
    disturb(model, seed=7)
    save(model, tmp_path / "two", write)
    starts = [load_file(tmp_path / name / "pissa_init" / "adapter_model.safetensors") for name in ("one", "two")]
    assert all(torch.equal(starts[0][key], starts[1][key]) for key in starts[0]) and len(starts[1]) == len(starts[0])
    again = adapt(
        build_model("llama"),
        AdapterConfig(adapter_name_or_path=str(tmp_path / "two")),
        lora.Config(),
        model_config=HERE,
        trainable=False,
    )
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


def test_an_adapter_that_forgot_its_start(tmp_path, caplog):
    trained(tmp_path)
    shutil.rmtree(tmp_path / "pissa_init")
    given = AdapterConfig(adapter_name_or_path=str(tmp_path))
    with caplog.at_level("WARNING", logger="luthier"):
        model = adapt(build_model("llama"), given, lora.Config(), model_config=HERE, trainable=True)
    assert "holds no pissa_init/" in caplog.text
    with pytest.raises(ModelError, match="does not say what it started from"):
        sidecars(model, given, HERE)


def test_it_cannot_be_its_own_reference(tmp_path):
    """Switched off, it leaves what it was trained beside, and not the model before training."""
    from luthier.model.policy import PolicySetup
    from luthier.model.reference import FrozenModel, ReferenceConfig, make_reference

    setup = PolicySetup(begin())
    with pytest.raises(ConfigError, match="ref_model: a PiSSA adapter takes the model apart"):
        make_reference(ReferenceConfig(), setup, HERE, dtype=torch.float32)
    build_model("llama").save_pretrained(tmp_path)
    own = ReferenceConfig(ref_model=str(tmp_path))
    assert isinstance(make_reference(own, setup, HERE, dtype=torch.float32), FrozenModel)


def test_plain_lora_has_no_sidecars():
    model = adapt(build_model("llama"), AdapterConfig(), lora.Config(), model_config=HERE, trainable=True)
    assert sidecars(model, AdapterConfig(), HERE) == []
    assert sidecars(build_model("llama"), AdapterConfig(), HERE) == []


def test_shapes_alone_are_enough_for_an_estimate():
    with torch.device("meta"):
        model = build_model("llama")
    keys = lora.Config(pissa_init=True)
    adapted = adapt(model, AdapterConfig(), keys, model_config=HERE, trainable=True)
    assert any("lora_A" in name for name, _ in adapted.named_parameters())


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"pissa_init": True, "pissa_iter": 0}, "pissa_iter: 0"),
        ({"pissa_convert": True}, "pissa_convert needs pissa_init"),
        ({"pissa_init": True, "use_dora": True}, "pissa_init.*DoRA"),
    ],
)
def test_what_does_not_go_together(keys, words):
    with pytest.raises(ConfigError, match=words):
        lora.Config(**keys)
