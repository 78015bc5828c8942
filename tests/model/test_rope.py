"""rope_scaling: factor and length as documented, positions as transformers computes them, nothing twice."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch

from luthier.core.errors import ConfigError
from luthier.model.load import load_model
from luthier.model.source import ModelConfig
from tests.conftest import build_model


def loaded(folder, length=None, **keys):
    return load_model(ModelConfig(model_name_or_path=str(folder), **keys), dtype=torch.float32, length=length)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("linear", {}),
        ("dynamic", {}),
        ("yarn", {"original_max_position_embeddings": 512}),
        ("llama3", {"original_max_position_embeddings": 512, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    ],
)
def test_the_factor_is_whole_and_the_length_grows_with_it(model_folder, kind, more):
    model = loaded(model_folder, 1300, rope_scaling=kind)
    found = {name: value for name, value in model.config.rope_parameters.items() if name != "rope_theta"}
    assert found == {"rope_type": kind, "factor": 3.0, **more}
    assert model.config.max_position_embeddings == 1536
    ids = torch.arange(10, 42)[None]
    at = torch.arange(100, 132)[None]
    with torch.no_grad():
        moved = model(ids, position_ids=at).logits - loaded(model_folder)(ids, position_ids=at).logits
    # Dynamic scaling changes nothing until a sequence is longer than the model's own length.
    assert (moved.abs().max() > 1e-5) == (kind != "dynamic")


def test_dynamic_scaling_says_that_it_waits(model_folder, caplog):
    with caplog.at_level(logging.WARNING):
        loaded(model_folder, 1300, rope_scaling="dynamic")
        assert "dynamic leaves sequences of up to 1536 tokens as they are" in caplog.text
        assert "Unrecognized" not in caplog.text, "transformers knows every key it is given"
        caplog.clear()
        loaded(model_folder, 1300, rope_scaling="yarn")
    assert not caplog.records


def test_an_adapter_of_stretched_positions_reminds_of_them(model_folder, tmp_path, caplog):
    """A file for export or chat that names model and adapter alone, as users of LLaMA-Factory write it."""
    from luthier.adapters import lora
    from luthier.model.adapt import AdapterConfig, adapt, attach

    here = ModelConfig(model_name_or_path=str(model_folder))
    adapted = adapt(build_model("llama"), AdapterConfig(), lora.Config(), model_config=here, trainable=True)
    adapted.save_pretrained(tmp_path)
    (tmp_path / "resolved_config.yaml").write_text("rope_scaling: yarn\ncutoff_len: 1300\n")
    with caplog.at_level(logging.WARNING, logger="luthier"):
        attach(loaded(model_folder, 1300, rope_scaling="yarn"), tmp_path)
        assert "was trained with" not in caplog.text
        attach(loaded(model_folder), tmp_path)
        assert "trained with rope_scaling: yarn and cutoff_len: 1300" in caplog.text
        caplog.clear()
        (tmp_path / "resolved_config.yaml").write_text("rope_scaling: yarn\ncutoff_len: 512\n")
        attach(loaded(model_folder), tmp_path)
    assert "was trained with" not in caplog.text


def test_linear_scaling_divides_positions(model_folder):
    """Position 30 of a model stretched three times is position 10 of the plain one."""
    ids = torch.arange(10, 42)[None]
    with torch.no_grad():
        stretched = loaded(model_folder, 1536, rope_scaling="linear")(ids, position_ids=torch.arange(0, 96, 3)[None])
        plain = loaded(model_folder)(ids, position_ids=torch.arange(32)[None])
    torch.testing.assert_close(stretched.logits, plain.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [512, 40, None])
def test_what_fits_is_left_alone(model_folder, length, caplog):
    with caplog.at_level(logging.INFO, logger="luthier"):
        model = loaded(model_folder, length, rope_scaling="yarn")
    assert model.config.rope_parameters["rope_type"] == "default" and model.config.max_position_embeddings == 512
    assert ("nothing is stretched" in caplog.text) == (length is not None)


def test_a_saved_stretched_model_is_not_stretched_again(model_folder, tmp_path):
    model = loaded(model_folder, 1300, rope_scaling="yarn")
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path, 1300, rope_scaling="yarn")
    assert again.config.rope_parameters == model.config.rope_parameters
    assert again.config.max_position_embeddings == 1536
    with pytest.raises(ConfigError, match="stretched already .yarn, to 1536 positions"):
        loaded(tmp_path, 2000, rope_scaling="yarn")


def test_only_layers_that_see_everything_are_stretched(tmp_path):
    build_model("gemma3", max_position_embeddings=64).save_pretrained(tmp_path)
    found = loaded(tmp_path, 100, rope_scaling="linear").config.rope_parameters
    assert found["full_attention"]["factor"] == 2.0 and found["full_attention"]["rope_type"] == "linear"
    assert found["sliding_attention"]["rope_type"] == "default"


def test_models_without_rotary_positions(tmp_path):
    build_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="rope_scaling: gpt2 has no rotary positions"):
        loaded(tmp_path, 1000, rope_scaling="linear")


def test_old_names_in_config_json_count_as_stretched(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "old")
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("rope_parameters")
    settings["rope_scaling"] = {"type": "linear", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="stretched already .linear"):
        loaded(folder, 1000, rope_scaling="yarn")
