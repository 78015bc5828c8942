"""Loading models: all weights from the file or a clear error, and vocabularies that fit."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.core.errors import ConfigError, ModelError
from luthier.model.load import load_model
from luthier.model.source import ModelConfig
from luthier.model.tokenizer import load_tokenizer
from tests.conftest import build_model, build_tokenizer

IDS = torch.arange(10, 42).reshape(2, 16)


def config_of(folder, **keys) -> ModelConfig:
    return ModelConfig(model_name_or_path=str(folder), **keys)


def edit_weights(folder, change) -> None:
    """Rewrite the weights file of a folder by `change(dict of tensors)`."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_json(file, **values) -> None:
    held = json.loads(file.read_text())
    file.write_text(json.dumps(held | values))


@pytest.fixture
def folder(tmp_path, model_folder):
    """A copy of the tiny model's folder that a test may spoil."""
    return shutil.copytree(model_folder, tmp_path / "model")


def test_the_weights_are_those_of_the_file_and_the_logits_those_of_transformers(model_folder):
    model = load_model(config_of(model_folder), dtype=torch.float32)
    for name, tensor in load_file(model_folder / "model.safetensors").items():
        assert torch.equal(model.get_parameter(name), tensor), name
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, build_model("llama").eval()(IDS).logits)


@pytest.mark.parametrize(
    ("keys", "asked", "held"),
    [
        ({}, torch.float32, torch.float32),
        ({}, None, torch.bfloat16),  # the checkpoint's own
        ({"infer_dtype": "float16"}, None, torch.float16),
        ({"infer_dtype": "float16"}, torch.float32, torch.float32),  # only for inference
        ({"torch_dtype": "float16"}, None, torch.float16),
        ({"torch_dtype": "bfloat16"}, torch.float32, torch.bfloat16),  # the user's word comes first
        ({"torch_dtype": "float16", "infer_dtype": "float32"}, None, torch.float32),
        ({}, torch.float64, torch.float64),
    ],
)
def test_which_number_format_the_weights_have(tmp_path, keys, asked, held):
    build_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(config_of(tmp_path, **keys), dtype=asked)
    assert {parameter.dtype for parameter in model.parameters()} == {held}


@pytest.mark.parametrize(
    ("flash_attn", "attn", "used"),
    [("disabled", None, "eager"), ("sdpa", None, "sdpa"), ("auto", None, "sdpa"), ("sdpa", "eager", "eager")],
)
def test_which_attention_is_used(model_folder, flash_attn, attn, used):
    model = load_model(config_of(model_folder, flash_attn=flash_attn), dtype=torch.float32, attn=attn)
    assert model.config._attn_implementation == used


def test_a_weight_the_file_lacks_is_an_error_not_a_random_number(folder):
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight.*random"):
        load_model(config_of(folder))


def test_a_head_tied_to_the_embedding_need_not_be_in_the_file(tmp_path):
    build_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_model(config_of(tmp_path), dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_without_its_head_is_no_language_model(folder):
    edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ModelError, match="lm_head.weight"):
        load_model(config_of(folder))


def test_weights_of_another_shape_are_named_with_both_shapes(folder):
    edit_json(folder / "config.json", intermediate_size=64)
    with pytest.raises(ModelError, match=r"down_proj\.weight \(file \(32, 48\), config\.json \(32, 64\)\)"):
        load_model(config_of(folder))


def test_weights_without_a_place_are_told(folder, caplog):
    edit_weights(folder, lambda tensors: tensors.update({"score.weight": torch.zeros(2, 32)}))
    with caplog.at_level("WARNING", logger="luthier"):
        load_model(config_of(folder))
    assert "score.weight" in caplog.text


def test_a_cut_off_weights_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError, match="model.*cannot be read"):
        load_model(config_of(folder))


def test_what_is_not_a_model_folder(tmp_path):
    def message(name, **keys) -> str:
        with pytest.raises(ModelError) as caught:
            load_model(config_of(name, **keys))
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    assert "no config.json; it is empty" in message(tmp_path / "empty")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    assert "it holds todo.txt" in message(tmp_path / "notes")
    assert "is a file" in message(tmp_path / "notes" / "todo.txt")
    assert "there is no folder" in message(tmp_path / "absent")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "adapter_name_or_path" in message(tmp_path / "adapter")
    assert "not a local folder" in message("nobody/nothing") and "hub" in message("nobody/nothing")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "broken" / "model.safetensors").write_text("")
    assert "broken" in message(tmp_path / "broken")


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        load_model(config_of(folder))


def test_an_encoder_decoder_is_no_causal_language_model(tmp_path):
    from transformers import T5Config

    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ModelError, match="no causal language model: its architecture is T5ForConditionalGeneration"):
        load_model(config_of(tmp_path))


def test_an_empty_name_is_refused():
    with pytest.raises(ConfigError, match="model_name_or_path"):
        ModelConfig(model_name_or_path=" ")


def test_from_scratch_takes_the_architecture_and_no_weights(folder):
    (folder / "model.safetensors").unlink()
    keys = {"train_from_scratch": True}
    one, same, other = (load_model(config_of(folder, **keys), dtype=torch.float32, seed=s) for s in (1, 1, 2))
    assert len(one.model.layers) == 2
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_loading_leaves_the_random_numbers_of_the_run_alone(model_folder):
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    load_model(config_of(model_folder), dtype=torch.float32, seed=1)
    assert torch.equal(torch.rand(3), wanted)


def test_more_tokens_than_embeddings_is_an_error(model_folder):
    tokenizer = build_tokenizer(extra_specials=())
    tokenizer.add_tokens([f"zork{i}" for i in range(5)])
    with pytest.raises(ModelError, match=r"405 tokens.*embeddings for 400.*resize_vocab"):
        load_model(config_of(model_folder), tokenizer=tokenizer)


def test_a_vocabulary_with_spare_rows_is_left_alone(tmp_path, tokenizer):
    build_model("llama", vocab_size=410).save_pretrained(tmp_path)
    model = load_model(config_of(tmp_path, resize_vocab=True), tokenizer=tokenizer, dtype=torch.float32)
    assert model.get_input_embeddings().weight.shape[0] == 410


@pytest.mark.parametrize("shared", [False, True])
def test_a_grown_vocabulary(tmp_path, shared):
    """Old rows untouched; new ones are the mean of the old plus noise of deviation 1/sqrt(width)."""
    width = 256
    build_model("llama", tie_word_embeddings=shared, hidden_size=width).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    old = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    config = config_of(tmp_path, resize_vocab=True, add_tokens="zork, blub")
    tokenizer = load_tokenizer(config)
    assert len(tokenizer) == 402
    model = load_model(config, tokenizer=tokenizer, dtype=torch.float32, seed=3)
    grown = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    assert grown.shape == head.shape == (448, width)  # the next multiple of 64
    assert model.config.vocab_size == 448
    assert torch.equal(grown[:400], old)
    noise = grown[400:] - old.mean(0)
    assert noise.std().item() == pytest.approx(1 / math.sqrt(width), rel=0.05)
    assert abs(noise.mean().item()) < 0.005
    assert (head is grown) == shared
    head_noise = head[400:] - head[:400].mean(0)
    assert head_noise.std().item() == pytest.approx(1 / math.sqrt(width), rel=0.05)
    assert torch.equal(head_noise, noise) == shared  # two matrices, two draws
    again = load_model(config, tokenizer=tokenizer, dtype=torch.float32, seed=3)
    assert torch.equal(again.get_input_embeddings().weight, grown)
    model.save_pretrained(tmp_path / "saved")
    saved = load_model(config_of(tmp_path / "saved"), tokenizer=tokenizer, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(saved(IDS).logits, model(IDS).logits)


def test_published_sampling_values_do_not_keep_a_model_from_being_saved(folder, tmp_path):
    """Llama 2's folder has temperature and top_p with do_sample off; once anything in it was changed, as trainers do
    with the pad token, transformers refuses to write it."""
    edit_json(folder / "generation_config.json", temperature=0.9, top_p=0.6, do_sample=False)
    model = load_model(config_of(folder))
    model.generation_config.pad_token_id = 0
    model.save_pretrained(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved["temperature"] == 0.9 and saved["pad_token_id"] == 0


def test_settings_can_be_made_without_torch():
    import subprocess
    import sys

    code = (
        "import sys; from luthier.model.source import ModelConfig; from luthier.model.adapt import AdapterConfig; "
        "from luthier.adapters import lora, full, freeze; from luthier.export import ExportConfig; lora.Config(); "
        "sys.exit(bool({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
