"""Export of every kind of adapter keeps the logits; a quantised base gets a plain answer."""

from __future__ import annotations

import pytest
import torch

from luthier.adapters import lora, oft
from luthier.core.errors import ModelError
from luthier.export import ExportConfig, export
from luthier.model.adapt import AdapterConfig, adapt, finish, sidecars
from luthier.model.load import load_model
from luthier.model.quantise import QuantConfig
from luthier.model.source import ModelConfig
from tests.conftest import build_model, build_tokenizer

IDS = torch.arange(10, 42).reshape(2, 16)
KINDS = {
    "lora": lora.Config(),
    "rslora": lora.Config(use_rslora=True, lora_rank=4),
    "dora": lora.Config(use_dora=True),
    "pissa": lora.Config(pissa_init=True, pissa_convert=True),
    "oft": oft.Config(oft_block_size=16),
}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().float()(IDS).logits


def trained(folder, kind) -> tuple[ModelConfig, AdapterConfig, torch.Tensor]:
    build_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder / "base")
    build_tokenizer().save_pretrained(folder / "base")
    base = ModelConfig(model_name_or_path=str(folder / "base"))
    given = AdapterConfig(finetuning_type="oft" if kind == "oft" else "lora")
    model = adapt(load_model(base, dtype=torch.float32), given, KINDS[kind], model_config=base, trainable=True)
    write = sidecars(model, given, base)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder / "adapter")
    for one in write:
        one(folder / "adapter")
    finish(given, KINDS[kind], folder / "adapter")
    return base, given, logits(model)


@pytest.mark.parametrize(("kind", "where"), [*((kind, "") for kind in KINDS), ("pissa", "pissa_converted")])
def test_the_exported_model_says_what_the_adapter_said(tmp_path, kind, where):
    base, given, wanted = trained(tmp_path, kind)
    folder = AdapterConfig(
        finetuning_type=given.finetuning_type,
        adapter_name_or_path=str(tmp_path / "adapter"),
        adapter_folder=where or None,
    )
    done = export(base, folder, ExportConfig(export_dir=str(tmp_path / "out")))
    saved = load_model(ModelConfig(model_name_or_path=str(tmp_path / "out")))
    torch.testing.assert_close(logits(saved), wanted, rtol=1e-4, atol=1e-4)
    assert done.changed == 14 and (wanted - logits(load_model(base))).abs().max() > 0.05


def test_a_base_that_is_stored_quantised(tmp_path):
    pytest.importorskip("bitsandbytes")
    base, given, _ = trained(tmp_path, "lora")
    load_model(base, quant=QuantConfig(quantization_bit=4), dtype=torch.float32).save_pretrained(tmp_path / "four")
    build_tokenizer().save_pretrained(tmp_path / "four")
    adapter = AdapterConfig(adapter_name_or_path=str(tmp_path / "adapter"))
    stored = ModelConfig(model_name_or_path=str(tmp_path / "four"))
    with pytest.raises(ModelError, match="is stored quantised .bnb., and an adapter merged.*Name the full model"):
        export(stored, adapter, ExportConfig(export_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_stretched_model_is_exported_stretched(tmp_path):
    base, given, _ = trained(tmp_path, "lora")
    long = ModelConfig(model_name_or_path=base.model_name_or_path, rope_scaling="yarn")
    adapter = AdapterConfig(adapter_name_or_path=str(tmp_path / "adapter"))
    export(long, adapter, ExportConfig(export_dir=str(tmp_path / "out")), length=1000)
    saved = load_model(ModelConfig(model_name_or_path=str(tmp_path / "out"))).config
    assert saved.max_position_embeddings == 1024 and saved.rope_parameters["factor"] == 2.0
