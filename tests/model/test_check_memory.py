"""luthier check: the memory of a quantised base, and packages that are missing."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch

from luthier.adapters import lora
from luthier.check import estimate
from luthier.core.errors import ConfigError
from luthier.model.adapt import AdapterConfig, adapt
from luthier.model.source import ModelConfig
from tests.conftest import build_model


def test_few_bits_are_few_bytes():
    with torch.device("meta"):
        model = build_model("llama", hidden_size=256, intermediate_size=512)
    here = ModelConfig(model_name_or_path="unused")
    model = adapt(model, AdapterConfig(), lora.Config(), model_config=here, trainable=True)
    facts = {"tokens": 10, "element": 4, "checkpointing": False}
    whole, four, eight = (estimate(model, **facts, bits=bits).weights for bits in (None, 4, 8))
    # Two layers: q and o of 256 x 256, k and v of 256 x 128, three of 256 x 512.
    linear = 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
    assert whole - four == linear * 4 - linear * 4.5 / 8
    assert whole - eight == linear * 4 - linear * 8.5 / 8


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"finetuning_type": "full", "use_galore": True}, "use_galore needs the package galore-torch"),
        ({"optim": "schedule_free_adamw"}, "optim: schedule_free_adamw needs the package schedulefree"),
        ({"quantization_bit": 8, "quantization_method": "quanto"}, "quanto needs optimum-quanto"),
        ({"plot_loss": True}, "plot_loss: true needs matplotlib"),
    ],
)
def test_missing_packages_are_found_before_anything_is_loaded(model_folder, tmp_path, monkeypatch, keys, words):
    from luthier.check import check
    from luthier.run import resolve

    run = resolve({"model_name_or_path": str(model_folder), "dataset": "d", "output_dir": str(tmp_path)} | keys)
    real = importlib.util.find_spec
    optional = ("galore_torch", "schedulefree", "optimum.quanto", "matplotlib")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in optional else real(name))
    with pytest.raises(ConfigError, match=words):
        check(run)


def test_what_libraries_announce_is_not_among_the_findings(model_folder, tmp_path, recwarn):
    from luthier.check import check
    from luthier.run import resolve

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "q", "output": "a"}\n' * 4)
    keys = {"model_name_or_path": str(model_folder), "dataset": str(rows), "output_dir": str(tmp_path / "out")}
    warnings.simplefilter("default")
    check(resolve(keys | {"stage": "sft", "template": "alpaca", "finetuning_type": "lora", "use_cpu": True}))
    assert [str(warning.message) for warning in recwarn if warning.category is FutureWarning] == []
