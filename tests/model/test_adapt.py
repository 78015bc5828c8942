"""Adapters on disk: saved, loaded, merged in order, gone on with, refused when they belong to another model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.adapters import freeze, full, lora, oft
from luthier.core.errors import ConfigError, ModelError
from luthier.model.adapt import AdapterConfig, adapt, attach, merge
from luthier.model.load import load_model
from luthier.model.source import ModelConfig
from luthier.model.tokenizer import load_tokenizer
from tests.conftest import build_model, build_tokenizer

HERE = ModelConfig(model_name_or_path="unused")
IDS = torch.arange(10, 42).reshape(2, 16)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def ready(model, *, where=HERE, trainable=False, keys=None, **adapter):
    return adapt(model, AdapterConfig(**adapter), keys or lora.Config(), model_config=where, trainable=trainable)


def disturb(model, seed: int = 1) -> None:
    """Move every trained weight, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapter(folder, model=None, *, seed: int = 1, **config):
    """A trained adapter's folder and the weight changes it stands for, computed here: name -> scale * B A."""
    model = ready(model or build_model("llama"), trainable=True, keys=lora.Config(**config))
    disturb(model, seed)
    model.save_pretrained(folder)
    changes = {}
    for name, module in model.get_base_model().named_modules():
        if name.endswith("_proj"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            changes[name] = (module.scaling["default"] * b @ a).detach()
    return str(folder), changes


def test_saved_and_loaded_again_it_says_the_same(tmp_path):
    model = ready(build_model("llama"), trainable=True)
    disturb(model)
    model.save_pretrained(tmp_path)
    wanted = logits(model)
    assert (wanted - logits(build_model("llama"))).abs().max() > 0.1
    assert torch.equal(logits(attach(build_model("llama"), tmp_path)), wanted)
    torch.testing.assert_close(logits(ready(build_model("llama"), adapter_name_or_path=str(tmp_path))), wanted)


@pytest.mark.parametrize(("method", "keys"), [("lora", lora.Config()), ("oft", oft.Config())])
def test_what_is_saved_of_an_adapter_is_the_same_in_every_process(tmp_path, method, keys):
    """Not in the order of a set of names, which each process hashes in its own way."""
    folder = tmp_path / "once"
    ready(build_model("llama"), trainable=True, keys=keys, finetuning_type=method).save_pretrained(folder)
    again = ready(build_model("llama"), trainable=True, adapter_name_or_path=str(folder))
    again.save_pretrained(tmp_path / "again")
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    for place in (folder, tmp_path / "again"):
        assert json.loads((place / "adapter_config.json").read_text())["target_modules"] == names


def test_for_inference_all_adapters_are_merged_in_order(tmp_path):
    one, first = save_adapter(tmp_path / "one", seed=1)
    two, second = save_adapter(tmp_path / "two", seed=2, lora_rank=4)
    model = ready(build_model("llama"), adapter_name_or_path=f"{one}, {two}")
    plain = dict(build_model("llama").named_modules())
    for name, change in first.items():
        wanted = plain[name].weight + change + second[name]
        torch.testing.assert_close(dict(model.named_modules())[name].weight, wanted)
    assert not trained(model) and not model.training
    assert type(model) is type(build_model("llama"))


def test_training_goes_on_with_the_last_adapter(tmp_path):
    one, first = save_adapter(tmp_path / "one", seed=1)
    two, _ = save_adapter(tmp_path / "two", seed=2, lora_rank=4)
    model = ready(build_model("llama"), trainable=True, adapter_name_or_path=[one, two])
    base = dict(build_model("llama").named_modules())
    for name, module in model.get_base_model().named_modules():
        if name in first:
            torch.testing.assert_close(module.base_layer.weight, base[name].weight + first[name])
            assert torch.equal(
                module.lora_B["default"].weight,
                load_file(f"{two}/adapter_model.safetensors")[f"base_model.model.{name}.lora_B.weight"],
            )
    assert len(trained(model)) == 2 * len(first) and all("lora_" in name for name in trained(model))
    assert model.training


def test_a_new_adapter_starts_on_top_of_the_merged_ones(tmp_path):
    one, first = save_adapter(tmp_path / "one")
    model = ready(build_model("llama"), trainable=True, adapter_name_or_path=one, create_new_adapter=True)
    for name, module in model.get_base_model().named_modules():
        if name in first:
            assert not module.lora_B["default"].weight.any()
    torch.testing.assert_close(logits(model), logits(ready(build_model("llama"), adapter_name_or_path=one)))


def test_the_weights_may_lie_in_a_folder_inside(tmp_path):
    save_adapter(tmp_path / "run" / "inner")
    model = ready(build_model("llama"), adapter_name_or_path=str(tmp_path / "run"), adapter_folder="inner")
    assert (logits(model) - logits(build_model("llama"))).abs().max() > 0.1


def test_without_adapters_inference_leaves_the_model_as_it_is():
    model = ready(build_model("llama"))
    assert torch.equal(logits(model), logits(build_model("llama")))
    assert not trained(model)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_grown_vocabulary_travels_with_the_adapter(tmp_path, kind, shared):
    """Trained, saved, loaded for more training, merged, saved whole: the same model at every station."""
    build_model(kind, tie_word_embeddings=shared).save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    where = ModelConfig(model_name_or_path=str(tmp_path / "base"), resize_vocab=True, add_tokens="zork")
    tokenizer = load_tokenizer(where)

    def base(seed=0):
        return load_model(where, tokenizer=tokenizer, dtype=torch.float32, seed=seed)

    model = ready(base(), where=where, trainable=True)
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    wanted = logits(model)
    assert wanted.shape[-1] == 448
    adapter = str(tmp_path / "adapter")
    # another seed gives the new rows other noise, which the adapter must replace
    resumed = ready(base(seed=9), where=where, trainable=True, adapter_name_or_path=adapter)
    assert torch.equal(logits(resumed), wanted)
    whole = [tuple(p.shape) for name, p in resumed.named_parameters() if p.requires_grad and "lora_" not in name]
    assert whole == [(448, 32)] * (1 if shared else 2)
    if shared:  # further training moves embedding and head as one
        disturb(resumed, seed=2)
        embedding = next(p for name, p in resumed.named_parameters() if p.requires_grad and "lora_" not in name)
        with torch.no_grad():
            inner = resumed.get_base_model().eval()
            expected = inner.get_decoder()(IDS).last_hidden_state @ embedding.T
            torch.testing.assert_close(inner(IDS).logits, expected)
    merged = ready(base(seed=9), where=where, adapter_name_or_path=adapter)
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-5, atol=1e-5)
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == shared
    merged.save_pretrained(tmp_path / "merged")
    again = load_model(ModelConfig(model_name_or_path=str(tmp_path / "merged")))
    assert torch.equal(logits(again), logits(merged))


def test_a_tied_head_that_an_adapter_trained_apart_is_not_lost(tmp_path):
    """Adapters of other programs hold two copies of what is one in the base model."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = get_peft_model(build_model("llama", tie_word_embeddings=True), settings)
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    wanted = logits(model)
    merged = ready(build_model("llama", tie_word_embeddings=True), adapter_name_or_path=str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = load_model(ModelConfig(model_name_or_path=str(tmp_path / "merged")))
    torch.testing.assert_close(logits(again), wanted, rtol=1e-5, atol=1e-5)


def test_merging_weights_that_are_not_finite_is_an_error(tmp_path):
    folder, _ = save_adapter(tmp_path / "one")
    file = tmp_path / "one" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if "lora_B" in name)[0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="cannot be merged"):
        merge(attach(build_model("llama"), tmp_path / "one"))


def spoil(folder, change) -> str:
    """Rewrite an adapter's weights by `change(dict of tensors)`."""
    path, _ = save_adapter(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return path


def complaint(path, model=None, **adapter) -> str:
    with pytest.raises(ModelError) as caught:
        ready(model or build_model("llama"), adapter_name_or_path=str(path), **adapter)
    return str(caught.value)


def test_what_is_no_adapter_folder(tmp_path):
    assert "there is no folder" in complaint(tmp_path / "absent")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    assert "no adapter_config.json; it holds todo.txt" in complaint(tmp_path / "notes")
    (tmp_path / "notes" / "adapter_config.json").write_text("{")
    assert "no adapter_model.safetensors" in complaint(tmp_path / "notes")
    (tmp_path / "notes" / "adapter_model.safetensors").write_text("")
    assert "not JSON" in complaint(tmp_path / "notes")
    (tmp_path / "notes" / "adapter_config.json").write_text(json.dumps({"r": 8}))
    assert str(tmp_path / "notes") in complaint(tmp_path / "notes")
    assert "holds nothing" in complaint(tmp_path, adapter_folder="nowhere")
    assert "not a local folder" in complaint("nobody/nothing")


def test_an_adapter_of_a_wider_model(tmp_path):
    path, _ = save_adapter(tmp_path / "wide", build_model("llama", hidden_size=64))
    said = complaint(path)
    assert "made for another model" in said and "64" in said and "32" in said


def test_an_adapter_of_a_deeper_model(tmp_path):
    path, _ = save_adapter(tmp_path / "deep", build_model("llama", num_hidden_layers=3))
    assert "layers.2" in complaint(path)


def test_an_adapter_of_another_architecture(tmp_path):
    model = ready(build_model("gpt2"), trainable=True)
    model.save_pretrained(tmp_path)
    assert "transformer.h.0" in complaint(tmp_path)


def test_an_adapter_whose_weights_are_not_all_there(tmp_path):
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    assert key in complaint(spoil(tmp_path / "less", lambda tensors: tensors.pop(key)))


def test_an_adapter_with_weights_that_have_no_place(tmp_path):
    def add(tensors):
        tensors["base_model.model.model.norm.lora_B.weight"] = torch.ones(2, 2)

    assert "model.norm.lora_B.weight" in complaint(spoil(tmp_path / "more", add))


def test_an_adapter_for_a_larger_vocabulary_asks_for_resize_vocab(tmp_path):
    model = ready(build_model("llama", vocab_size=448), trainable=True, additional_target="embed_tokens")
    model.save_pretrained(tmp_path)
    assert "resize_vocab" in complaint(tmp_path)


@pytest.mark.parametrize(("name", "keys"), [("full", full.Config()), ("freeze", freeze.Config())])
def test_adapters_go_with_lora_only(tmp_path, name, keys):
    path, _ = save_adapter(tmp_path / "one")
    with pytest.raises(ConfigError, match="adapter_name_or_path does not go with finetuning_type"):
        ready(build_model("llama"), trainable=True, keys=keys, finetuning_type=name, adapter_name_or_path=path)


def test_an_unknown_type_names_the_nearest():
    with pytest.raises(ConfigError, match="'lroa'.*Did you mean 'lora'"):
        ready(build_model("llama"), trainable=True, finetuning_type="lroa")


def test_random_weights_are_for_training_only():
    scratch = ModelConfig(model_name_or_path="unused", train_from_scratch=True)
    with pytest.raises(ConfigError, match="train_from_scratch"):
        ready(build_model("llama"), where=scratch)
    assert trained(ready(build_model("llama"), where=scratch, trainable=True))
