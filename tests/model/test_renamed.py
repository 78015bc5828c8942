"""Checkpoints of models whose weights have other names on the disk than in memory."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from luthier.core.errors import CheckpointError
from luthier.fit import fit
from luthier.model import renamed
from luthier.run import resolve
from tests.conftest import TINY, build_model, build_tokenizer

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "pad_token_id": 3}


def mixture(seed: int, dtype=torch.float32):
    """Experts are one tensor in memory, and one matrix each in the file."""
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(transformers.MixtralConfig(**TINY, **EXPERTS), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_weight_is_read_to_the_last_bit(tmp_path, dtype):
    stored, model = mixture(0, dtype), mixture(1, dtype)
    if dtype == torch.bfloat16:  # as upcast_layernorm leaves it
        for one in (stored, model):
            one.model.norm.float().weight.data += 1e-4
    stored.save_pretrained(tmp_path)
    assert any(".w1." in name for name in load_file(tmp_path / "model.safetensors"))
    assert renamed.load(model, tmp_path)
    for (name, wanted), found in zip(stored.named_parameters(), model.parameters()):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), name


def test_weights_that_have_their_own_names_are_left_to_transformers(tmp_path):
    build_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    assert not renamed.load(build_model("llama", tie_word_embeddings=True, seed=1), tmp_path)


def test_what_is_missing_is_named(tmp_path):
    mixture(0).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks weights of the model: model.norm.weight"):
        renamed.load(mixture(1), tmp_path)


def test_a_resumed_mixture_goes_on_from_its_own_experts(tmp_path):
    """Found by hand: transformers skipped them with a warning, and the run went on from those before training."""
    mixture(0).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"instruction": f"What is {i}?", "output": f"It is {i}."} for i in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    keys = {"model_name_or_path": str(tmp_path / "model"), "dataset": str(tmp_path / "rows.json"), "cutoff_len": 128}
    keys |= {
        "finetuning_type": "full",
        "max_steps": 2,
        "save_steps": 1,
        "learning_rate": 1e-2,
        "save_only_model": False,
    }
    fit(resolve(keys | {"output_dir": str(tmp_path / "straight")}))
    shutil.copytree(tmp_path / "straight" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
    fit(resolve(keys | {"output_dir": str(tmp_path / "again")}))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "again"))
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())
