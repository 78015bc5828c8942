"""Export: what is saved says what the adapter says, and nothing is saved where that cannot be had."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from luthier import export as module
from luthier.adapters import lora
from luthier.core.errors import ConfigError, ModelError
from luthier.export import ExportConfig, export
from luthier.model.adapt import AdapterConfig, adapt
from luthier.model.load import load_model
from luthier.model.source import ModelConfig
from tests.conftest import build_model, build_tokenizer

IDS = torch.arange(10, 42).reshape(2, 16)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().float()(IDS).logits


def make(folder, *, size: float = 0.1, **changes) -> tuple[ModelConfig, AdapterConfig, torch.Tensor]:
    """A base model, an adapter trained by `size`, and the logits of the two together."""
    build_model("llama", **changes).save_pretrained(folder / "base")
    build_tokenizer().save_pretrained(folder / "base")
    base = ModelConfig(model_name_or_path=str(folder / "base"))
    model = adapt(
        load_model(base, dtype=torch.float32), AdapterConfig(), lora.Config(), model_config=base, trainable=True
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
    if size == 0:
        assert not any(p.any() for name, p in model.named_parameters() if "lora_B" in name)
    model.save_pretrained(folder / "adapter")
    return base, AdapterConfig(adapter_name_or_path=str(folder / "adapter")), logits(model)


def to(folder, **keys) -> ExportConfig:
    return ExportConfig(export_dir=str(folder / "out" / "merged"), **keys)


def left_behind(folder) -> list[str]:
    return sorted(path.name for path in (folder / "out").iterdir()) if (folder / "out").exists() else []


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_saved_says_what_the_adapter_says(tmp_path, shared):
    base, adapter, wanted = make(tmp_path, tie_word_embeddings=shared)
    done = export(base, adapter, to(tmp_path))
    assert left_behind(tmp_path) == ["merged"]
    saved = load_model(ModelConfig(model_name_or_path=str(tmp_path / "out" / "merged")))
    torch.testing.assert_close(logits(saved), wanted, rtol=1e-5, atol=1e-5)
    assert (logits(saved) - logits(load_model(base))).abs().max() > 0.1
    assert done.changed == 14  # seven linear modules in each of two layers
    assert done.difference < 1e-5 < 0.1 < done.moved and done.dtype == "float32"
    assert str(done.folder) in str(done)


def test_the_folder_is_complete(tmp_path):
    from transformers import AutoTokenizer

    base, adapter, _ = make(tmp_path)
    folder = export(base, adapter, to(tmp_path)).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == build_tokenizer().chat_template
    assert tokenizer.padding_side == "left"
    assert (folder / "generation_config.json").is_file()
    assert not list(folder.glob("adapter_*"))
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_a_16_bit_model_stays_one(tmp_path):
    base, adapter, wanted = make(tmp_path, dtype=torch.bfloat16)
    done = export(base, adapter, to(tmp_path))
    assert {t.dtype for t in load_file(done.folder / "model.safetensors").values()} == {torch.bfloat16}
    saved = load_model(ModelConfig(model_name_or_path=str(done.folder)))
    assert done.dtype == "bfloat16"
    assert (logits(saved) - wanted).abs().max() < 0.02 < (logits(load_model(base)) - wanted).abs().max()


def test_merging_rounds_once(tmp_path):
    """The sum is made in float32 and then rounded, also where the user loads in 16 bits."""
    base, adapter, _ = make(tmp_path, dtype=torch.bfloat16)
    short = ModelConfig(model_name_or_path=base.model_name_or_path, torch_dtype="bfloat16")
    saved = load_file(export(short, adapter, to(tmp_path)).folder / "model.safetensors")
    old = load_file(tmp_path / "base" / "model.safetensors")
    trained = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        a, b = (trained[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        expected = (old[f"{name}.weight"].float() + 2.0 * (b @ a)).bfloat16()
        assert (saved[f"{name}.weight"] == expected).float().mean() > 0.999  # sums in another order may round apart


def test_infer_dtype_decides_the_format(tmp_path):
    base, adapter, _ = make(tmp_path)
    base = ModelConfig(model_name_or_path=base.model_name_or_path, infer_dtype="float16")
    folder = export(base, adapter, to(tmp_path)).folder
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.float16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"


def test_the_size_of_the_weights_files(tmp_path, monkeypatch):
    base, adapter, wanted = make(tmp_path)
    asked = []
    from transformers import LlamaForCausalLM

    real = LlamaForCausalLM.save_pretrained

    def small(self, folder, max_shard_size, **keys):
        asked.append(max_shard_size)
        real(self, folder, max_shard_size=60_000, **keys)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", small)
    folder = export(base, adapter, to(tmp_path, export_size=3)).folder
    assert asked == ["3GB"]
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(
        logits(load_model(ModelConfig(model_name_or_path=str(folder)))), wanted, rtol=1e-5, atol=1e-5
    )


def test_a_model_without_an_adapter_is_saved_as_it_is(tmp_path):
    base, _, _ = make(tmp_path)
    done = export(base, AdapterConfig(), to(tmp_path))
    assert done.changed == 0
    saved, original = (load_file(folder / "model.safetensors") for folder in (done.folder, tmp_path / "base"))
    assert saved.keys() == original.keys() and all(torch.equal(saved[name], original[name]) for name in saved)


def test_an_adapter_that_changes_nothing_is_refused(tmp_path):
    base, adapter, _ = make(tmp_path, size=0)
    with pytest.raises(ModelError, match="changes nothing.*never trained"):
        export(base, adapter, to(tmp_path))
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("size", [1e-10, 1e-6])
def test_changes_that_rounding_takes_away_are_refused(tmp_path, size):
    """In bfloat16 no weight moves, or only a few near zero that do not count; in float32 all matrices do."""
    base, adapter, _ = make(tmp_path, size=size, dtype=torch.bfloat16)
    with pytest.raises(ModelError, match="vanish in bfloat16.*infer_dtype: float32"):
        export(base, adapter, to(tmp_path))
    assert left_behind(tmp_path) == []


def test_small_changes_survive_in_float32(tmp_path):
    base, adapter, _ = make(tmp_path, size=1e-4, dtype=torch.bfloat16)
    exact = ModelConfig(model_name_or_path=base.model_name_or_path, infer_dtype="float32")
    assert export(exact, adapter, to(tmp_path)).changed == 14


def test_a_merge_that_says_something_else_is_refused(tmp_path, monkeypatch):
    base, adapter, _ = make(tmp_path)
    real = module.merge

    def wrong(model):
        merged = real(model)
        merged.model.layers[1].mlp.up_proj.weight.data[0] += 1.0
        return merged

    monkeypatch.setattr(module, "merge", wrong)
    with pytest.raises(ModelError, match="changes what the model says"):
        export(base, adapter, to(tmp_path))
    assert left_behind(tmp_path) == []


def test_a_file_that_does_not_hold_what_was_merged_is_refused(tmp_path, monkeypatch):
    base, adapter, _ = make(tmp_path)
    real = module.save_whole

    def wrong(model, tokenizer, folder, config):
        real(model, tokenizer, folder, config)
        shutil.copy(tmp_path / "base" / "model.safetensors", folder)

    monkeypatch.setattr(module, "save_whole", wrong)
    with pytest.raises(ModelError, match="are not those of the merged model"):
        export(base, adapter, to(tmp_path))
    assert left_behind(tmp_path) == []


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    base, adapter, _ = make(tmp_path)

    def full(model, tokenizer, folder, config):
        (folder / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_whole", full)
    with pytest.raises(ModelError, match="cannot be written.*No space left"):
        export(base, adapter, to(tmp_path))
    assert left_behind(tmp_path) == []


def test_a_folder_with_something_in_it_is_not_touched(tmp_path):
    base, adapter, _ = make(tmp_path)
    target = tmp_path / "out" / "merged"
    target.mkdir(parents=True)
    export(base, adapter, to(tmp_path))  # an empty one is filled
    with pytest.raises(ConfigError, match="not empty"):
        export(base, adapter, to(tmp_path))
    with pytest.raises(ConfigError, match="is a file"):
        export(base, adapter, ExportConfig(export_dir=str(target / "config.json")))
    with pytest.raises(ConfigError, match="export_dir is missing"):
        export(base, adapter, ExportConfig())
    with pytest.raises(ConfigError, match="export_size"):
        ExportConfig(export_size=0)


def test_random_weights_are_not_exported(tmp_path):
    with pytest.raises(ConfigError, match="train_from_scratch"):
        export(ModelConfig(model_name_or_path="x", train_from_scratch=True), AdapterConfig(), to(tmp_path))


def test_the_command(tmp_path, caplog):
    base, adapter, wanted = make(tmp_path)
    config = tmp_path / "export.yaml"
    config.write_text(
        f"model_name_or_path: {base.model_name_or_path}\nadapter_name_or_path: {adapter.adapter_name_or_path}\n"
    )
    with pytest.raises(ConfigError, match="export_dir"):
        module.main([str(config)])
    with caplog.at_level("INFO", logger="luthier"):
        assert module.main([str(config), f"export_dir={tmp_path}/out/merged"]) == 0
    saved = load_model(ModelConfig(model_name_or_path=str(tmp_path / "out" / "merged")))
    torch.testing.assert_close(logits(saved), wanted, rtol=1e-5, atol=1e-5)
