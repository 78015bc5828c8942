"""The DeepSpeed files that ship: transformers fills in every `auto` of them. DeepSpeed itself is not needed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import transformers
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from tests.conftest import build_model
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from luthier.core.errors import ConfigError
from luthier.run import resolve
from luthier.train import config

FILES = sorted((Path(__file__).resolve().parents[2] / "examples" / "deepspeed").glob("*.json"))
STAGES = {"z0": 0, "z2": 2, "z2_offload": 2, "z3": 3, "z3_offload": 3}


class Config(HfTrainerDeepSpeedConfig, HfDeepSpeedConfig):
    """transformers' own, without its check that DeepSpeed is installed."""

    def __init__(self, file):
        HfDeepSpeedConfig.__init__(self, file)
        self._dtype, self.mismatches = None, []


def _autos(value, place=""):
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in _autos(item, f"{place}.{key}")]
    return [place] if value == "auto" else []


def test_they_are_all_known():
    assert {file.stem.removeprefix("ds_").removesuffix("_config") for file in FILES} == set(STAGES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_auto_is_filled_in(file, tmp_path):
    name = file.stem.removeprefix("ds_").removesuffix("_config")
    filled = Config(str(file))
    assert filled._stage == STAGES[name] and filled.is_offload() == name.endswith("_offload")
    args = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=3, gradient_accumulation_steps=2, use_cpu=True
    )
    filled.trainer_config_process(args)
    filled.trainer_config_finalize(args, build_model("llama"), 10)
    assert _autos(filled.config) == [] and filled.mismatches == []
    assert filled.config["train_batch_size"] == 6 and filled.config["train_micro_batch_size_per_gpu"] == 3


def test_zero_3_gathers_what_it_saves():
    for file in FILES:
        zero = json.loads(file.read_text())["zero_optimization"]
        assert zero["stage"] != 3 or zero["stage3_gather_16bit_weights_on_model_save"] is True


def test_without_the_package_the_key_says_so(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "deepspeed" else find(name, *rest)
    )
    run = resolve({"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "deepspeed": str(FILES[0])})
    with pytest.raises(ConfigError, match="deepspeed: the package is not installed"):
        config.training_arguments(run.training, run.train)


GIVEN = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "template": "chatml"}


@pytest.mark.parametrize(
    ("file", "keys", "said"),
    [
        ('{"zero_optimization": {"stage": 2,}', {}, "deepspeed: .*is no JSON.*column 35"),
        ('{"bf16": {"enabled": true}}', {}, 'deepspeed: expected {"zero_optimization"'),
        (
            '{"gradient_accumulation_steps": 5, "zero_optimization": {"stage": 2}}',
            {"gradient_accumulation_steps": 3},
            "gradient_accumulation_steps: is 3, and DeepSpeed's file has gradient_accumulation_steps: 5",
        ),
        (
            '{"fp16": {"enabled": true}, "zero_optimization": {"stage": 2}}',
            {"fp16": False},
            "fp16: is False, and DeepSpeed's file has fp16.enabled: True",
        ),
        (
            '{"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}',
            {"optim": "adamw_torch"},
            "optim: would not be used",
        ),
        ((FILES[0]).read_text(), {"async_save": True}, "async_save: DeepSpeed's processes write"),
        (
            FILES[0].read_text(),
            {"load_best_model_at_end": True, "save_only_model": True, "eval_strategy": "steps", "val_size": 2},
            "load_best_model_at_end: DeepSpeed loads whole checkpoints",
        ),
        (FILES[0].read_text(), {"optim": "adafactor"}, "optim: adafactor goes by rows and columns"),
        (FILES[0].read_text(), {"use_muon": True, "finetuning_type": "full"}, "use_muon: goes by rows and columns"),
        (FILES[0].read_text(), {"use_adam_mini": True, "finetuning_type": "full"}, "use_adam_mini: goes by rows"),
    ],
)
def test_contradictions_are_said_before_anything_is_loaded(file, keys, said, tmp_path):
    path = tmp_path / "a file.json"
    path.write_text(file)
    with pytest.raises(ConfigError, match=said):
        resolve(GIVEN | keys | {"deepspeed": str(path)}, verb="train")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_ships_contradicts_nothing(file):
    keys = {"gradient_accumulation_steps": 3, "optim": "adamw_torch", "max_grad_norm": 0.5, "bf16": True}
    resolve(GIVEN | keys | {"deepspeed": str(file)}, verb="train")
    resolve(GIVEN | keys | {"deepspeed": json.loads(file.read_text())}, verb="train")


def test_accelerates_own_way_to_ask_for_it_is_answered(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="deepspeed: is not set, and `accelerate launch` was told"):
        resolve(GIVEN, verb="train")
    resolve(GIVEN | {"deepspeed": json.loads(FILES[0].read_text())}, verb="train")
