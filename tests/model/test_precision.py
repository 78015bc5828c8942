"""Number formats and what gradient checkpointing must not change."""

from __future__ import annotations

import pytest
import torch

from luthier.adapters import full, lora
from luthier.core.errors import ConfigError
from luthier.model.adapt import AdapterConfig, adapt
from luthier.model.load import load_model
from luthier.model.source import ModelConfig
from luthier.train.config import TrainConfig, derive, training_arguments
from tests.conftest import build_model

IDS = torch.arange(10, 42).reshape(2, 16)


def half(upcast_layernorm, *, kind="lora", model="llama"):
    keys = {"lora": lora.Config(), "full": full.Config()}[kind]
    here = ModelConfig(model_name_or_path="unused", upcast_layernorm=upcast_layernorm)
    base = build_model(model, dtype=torch.bfloat16)
    return adapt(base, AdapterConfig(finetuning_type=kind), keys, model_config=here, trainable=True, upcast=False)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("model", ["llama", "qwen3", "gpt2"])
def test_upcast_layernorm_keeps_norms_in_float32(kind, model):
    def norms(made):
        return {p.dtype for name, p in made.named_parameters() if "norm" in name or ".ln_" in name}

    assert norms(half(False, kind=kind, model=model)) == {torch.bfloat16}
    made = half(True, kind=kind, model=model)
    assert norms(made) == {torch.float32}
    others = {p.dtype for n, p in made.named_parameters() if not ("norm" in n or ".ln_" in n or "lora_" in n)}
    assert others == {torch.bfloat16}
    # It must run without autocast as well as with it: the first batch is checked before a Trainer exists.
    made(IDS).logits.float().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert made(IDS).logits.isfinite().all()


def gradients(checkpointing: dict | None, keys=None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    here = ModelConfig(model_name_or_path="unused")
    kind = "lora" if keys is not None else "full"
    model = adapt(
        build_model("llama"),
        AdapterConfig(finetuning_type=kind),
        keys or full.Config(),
        model_config=here,
        trainable=True,
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    if checkpointing is not None:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=checkpointing)
    torch.manual_seed(1)
    model.train()(IDS, labels=IDS).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("keys", [None, lora.Config(lora_dropout=0.3)])
def test_checkpointing_changes_no_gradient(reentrant, keys):
    """With dropout, and with a frozen embedding in front, where the reentrant form is known to lose them."""
    plain, again = gradients(None, keys), gradients({"use_reentrant": reentrant}, keys)
    assert plain and all(gradient is not None and gradient.any() for gradient in again.values())
    assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())


def derived(**keys):
    own = {name: keys.pop(name) for name in list(keys) if name in TrainConfig.__dataclass_fields__}
    return derive(keys | {"output_dir": "o"}, TrainConfig(**own))


def test_offload_goes_to_transformers_and_switches_checkpointing_on(monkeypatch):
    from luthier.train import config

    monkeypatch.setattr(config, "has_accelerator", lambda: True)
    keys, _, _ = derived(activation_offload=True, use_reentrant_gc=True)
    assert keys["activation_checkpointing"] is True
    assert keys["activation_checkpointing_kwargs"] == {"use_reentrant": True, "offload": True}
    keys, _, _ = derived(activation_offload=True, activation_checkpointing_kwargs={"every_n_layers": 2})
    assert keys["activation_checkpointing_kwargs"] == {"use_reentrant": False, "offload": True, "every_n_layers": 2}
    assert "offload" not in derived()[0]["activation_checkpointing_kwargs"]


def test_offload_on_a_cpu_is_said_to_be_idle(monkeypatch):
    from luthier.train import config

    monkeypatch.setattr(config, "has_accelerator", lambda: False)
    keys, train, notes = derived(activation_offload=True)
    assert keys["activation_checkpointing"] is False and not train.activation_offload
    assert any("activation_offload: on a CPU" in note for note in notes)


def test_liger_is_told_to_leave_the_loss_alone(monkeypatch):
    from luthier.train import config

    monkeypatch.setattr(config, "has_accelerator", lambda: True)
    monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: object())
    told = config.liger_settings({"rope": False})
    assert told == {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    args = training_arguments({"output_dir": "o", "use_liger_kernel": True, "use_cpu": True}, TrainConfig())
    assert args.liger_kernel_config == {"cross_entropy": False, "fused_linear_cross_entropy": False}
    with pytest.raises(ConfigError, match="liger_kernel_config: fused_linear_cross_entropy would never be used"):
        config.liger_settings({"fused_linear_cross_entropy": True})


def test_liger_where_it_cannot_run(monkeypatch):
    from luthier.train import config

    monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="use_liger_kernel: the package is not installed"):
        config.liger_settings(None)
    monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(config, "has_accelerator", lambda: False)
    with pytest.raises(ConfigError, match="use_liger_kernel: .*GPUs, and there is none"):
        config.liger_settings(None)


@pytest.mark.parametrize(("name", "package"), [("fa2", "flash-attn"), ("fa3", "flash-attn-3")])
def test_attention_whose_package_is_missing(model_folder, name, package):
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if {"fa2": is_flash_attn_2_available, "fa3": is_flash_attn_3_available}[name]():
        pytest.skip("it is installed")
    with pytest.raises(ConfigError, match=f"flash_attn: {name} needs the package {package}"):
        load_model(ModelConfig(model_name_or_path=str(model_folder), flash_attn=name))
