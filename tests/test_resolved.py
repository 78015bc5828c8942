"""`check --config-only`: what every key comes to, on stdout and nothing else, without data or model."""

from __future__ import annotations

import json

import pytest

from luthier.cli import main
from luthier.train import config as training


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "has_accelerator", lambda: False)
    monkeypatch.setattr(training, "_native_bf16", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        "model_name_or_path: no/such/model\n\ndataset: [nowhere, 'b']\noutput_dir: saves/é\nlearning_rate: 1e-4\n"
        "warmup_ratio: 0.1\nbf16: true\nhf_hub_token: hf_secret\nkto_chosen_weight: 3\n"
    )


def test_json_is_one_object_of_flat_keys_and_nothing_else(capsys, tmp_path):
    assert main(["check", "run.yaml", "lora_rank=4", "--config-only", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert out.count("\n") == 1 and "hf_secret" not in out
    expected = {
        "model_name_or_path": "no/such/model", "dataset": ["nowhere", "b"], "output_dir": "saves/é", "lora_rank": 4,
        "learning_rate": 1e-4, "warmup_steps": 0.1, "bf16": False, "stage": "sft", "finetuning_type": "lora",
        "cutoff_len": 2048, "lora_alpha": None, "do_train": True, "use_cpu": True, "per_device_train_batch_size": 8,
    }  # fmt: skip
    assert {key: found.get(key) for key in expected} == expected
    assert all(not isinstance(value, dict) for key, value in found.items() if not key.endswith("kwargs"))
    assert "kto_chosen_weight" not in found
    assert "kto_chosen_weight belongs to stage kto" in err and "computes in float32" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


def test_table_says_where_values_come_from(capsys):
    assert main(["check", "run.yaml", "lora_rank=4", "--config-only"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines}
    assert rows["learning_rate"].split()[1:] == ["0.0001", "run.yaml:5"]
    assert rows["warmup_steps"].split()[1:] == ["0.1", "run.yaml:6"]
    assert rows["lora_rank"].split()[1:] == ["4", "command", "line"]
    assert rows["use_cpu"].split()[1:] == ["true", "derived"]
    assert "cutoff_len" not in rows and "defaults" in lines[-1]


def test_problems_go_to_stderr_with_exit_code_2(capsys):
    assert main(["check", "run.yaml", "lora_rnk=4", "--config-only", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "did you mean 'lora_rank'" in err
    assert main(["check", "run.yaml", "--json"]) == 2
    assert "--config-only" in capsys.readouterr().err


def test_a_configuration_for_inference_needs_no_data(capsys, tmp_path):
    (tmp_path / "chat.yaml").write_text("model_name_or_path: m\ntemplate: qwen3\ninfer_backend: huggingface\n")
    assert main(["check", "chat.yaml", "--config-only", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["template"] == "qwen3" and "checked for chat" in err
    assert main(["check", "chat.yaml", "output_dir=o", "--config-only", "--json"]) == 2
    assert "dataset: is not set" in capsys.readouterr().err


def test_a_whole_check_of_a_file_that_is_not_for_training(tmp_path, capsys):
    """A LLaMA-Factory file for export or chat has no data set; that is no fault of it."""
    file = tmp_path / "merge.yaml"
    file.write_text(f"model_name_or_path: {tmp_path}\ntemplate: qwen\nexport_dir: out\nexport_legacy_format: false\n")
    assert main(["check", str(file)]) == 0
    assert "nothing in it says train" in capsys.readouterr().out
    file.write_text("model_name_or_path: some/model\ntemplate: qwen\nstage: sft\ndo_train: true\n")
    assert main(["check", str(file)]) == 2
    assert "dataset: is not set" in capsys.readouterr().err
