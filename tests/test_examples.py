"""Every shipped example comes through the gate, means what it says, and names data that exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.run import resolve

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
DATA = EXAMPLES / "data"

# file -> verb, and numbers read off the file by hand: (section of Run, key, value)
FACTS = {
    "demo.yaml": (
        "train",
        [
            ("adapter_keys", "lora_rank", 16),
            ("training", "learning_rate", 1e-3),
            ("training", "per_device_train_batch_size", 8),
            ("training", "num_train_epochs", 3.0),
            ("layout", "cutoff_len", 256),
            ("train", "plot_loss", True),
        ],
    ),
    "demo_chat.yaml": (
        "chat",
        [("generate", "do_sample", False), ("generate", "max_new_tokens", 64), ("template", "template", None)],
    ),
    "collect.yaml": (
        "collect",
        [
            ("generate", "do_sample", False),
            ("speculate", "draft", "prompt_lookup"),
            ("speculate", "draft_tokens", 5),
            ("collect", "collect_scorer", "rerun"),
            ("scorer_keys", "collect_samples", 1),
        ],
    ),
    "llama3_1_8b_lora_sft_accept_head.yaml": (
        "train",
        [
            ("adapter_keys", "lora_rank", 8),
            ("adapter", "additional_target", None),
            ("training", "gradient_accumulation_steps", 8),
            ("training", "bf16", True),
            ("layout", "cutoff_len", 2048),
        ],
    ),
    "sft_lora.yaml": (
        "train",
        [
            ("adapter_keys", "lora_rank", 8),
            ("adapter_keys", "lora_alpha", 16),
            ("adapter_keys", "lora_dropout", 0.05),
            ("training", "learning_rate", 1e-4),
            ("training", "gradient_accumulation_steps", 2),
            ("data", "val_size", 0.1),
            ("data", "max_samples", 1000),
            ("layout", "packing", False),
            ("train", "compute_accuracy", True),
        ],
    ),
    "sft_full.yaml": (
        "train",
        [
            ("adapter", "finetuning_type", "full"),
            ("training", "learning_rate", 2e-5),
            ("training", "neftune_noise_alpha", 5.0),
            ("training", "weight_decay", 0.1),
            ("layout", "packing", True),
        ],
    ),
    "sft_freeze.yaml": (
        "train",
        [
            ("adapter_keys", "freeze_trainable_layers", 4),
            ("adapter_keys", "freeze_trainable_modules", "mlp"),
            ("training", "warmup_steps", 5.0),
            ("training", "learning_rate", 5e-5),
        ],
    ),
    "pt_full.yaml": (
        "train",
        [("training", "max_steps", 10), ("data", "val_size", 2.0), ("layout", "cutoff_len", 256)],
    ),
    "pro_lora.yaml": (
        "train",
        [
            ("training", "learning_rate", 5e-4),
            ("training", "num_train_epochs", 6.0),
            ("data", "val_size", 6.0),
            ("layout", "cutoff_len", 256),
        ],
    ),
    "dpo_lora.yaml": (
        "train",
        [
            ("reference", "precompute_reference", False),
            ("training", "learning_rate", 2e-4),
            ("training", "num_train_epochs", 1.0),
            ("data", "val_size", 6.0),
        ],
    ),
    "kto_lora.yaml": (
        "train",
        [
            ("training", "learning_rate", 5e-4),
            ("training", "per_device_train_batch_size", 8),
            ("training", "num_train_epochs", 3.0),
            ("data", "val_size", 8.0),
        ],
    ),
    "tuna_lora.yaml": (
        "train",
        [
            ("training", "learning_rate", 5e-4),
            ("training", "num_train_epochs", 6.0),
            ("data", "val_size", 6.0),
            ("layout", "cutoff_len", 256),
        ],
    ),
    "rm_lora.yaml": (
        "train",
        [
            ("training", "learning_rate", 5e-4),
            ("training", "do_predict", True),
            ("training", "num_train_epochs", 2.0),
            ("data", "val_size", 16.0),
        ],
    ),
    "disco_rm.yaml": (
        "train",
        [
            ("training", "learning_rate", 5e-4),
            ("training", "do_predict", True),
            ("data", "val_size", 16.0),
            ("layout", "cutoff_len", 256),
        ],
    ),
    "export.yaml": ("export", [("export", "export_size", 5), ("export", "export_dir", "runs/demo_merged")]),
}


def test_every_example_has_its_facts():
    assert {file.name for file in EXAMPLES.glob("*.yaml")} == set(FACTS)


@pytest.mark.parametrize("name", sorted(FACTS))
def test_an_example_means_what_it_says(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    verb, facts = FACTS[name]
    run = resolve(EXAMPLES / name, verb=verb)
    assert run.warnings == ()
    for section, key, value in facts:
        owner = getattr(run, section)
        found = owner[key] if isinstance(owner, dict) else getattr(owner, key)
        assert found == value and type(found) is type(value), f"{section}.{key}"


def test_the_stage_follows_the_file(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert resolve(EXAMPLES / "pt_full.yaml").stage == "pt"
    assert resolve(EXAMPLES / "sft_lora.yaml").stage == "sft"
    assert resolve(EXAMPLES / "sft_freeze.yaml").objective.config.mask_history is True
    rounds = resolve(EXAMPLES / "llama3_1_8b_lora_sft_accept_head.yaml")
    assert (rounds.stage, rounds.objective.config.accept_layout) == ("accept_head", "sep")
    rm, disco = (resolve(EXAMPLES / name) for name in ("rm_lora.yaml", "disco_rm.yaml"))
    assert (rm.stage, rm.objective.config.rm_center) == ("rm", 0.01)
    assert (disco.stage, disco.objective.config.disco_noise) == ("disco_rm", 1.702)
    pro, tuna = (resolve(EXAMPLES / f"{stage}_lora.yaml").objective.config for stage in ("pro", "tuna"))
    assert (pro.pro_stage, pro.pro_sft_weight, pro.reward_scale) == (None, 0.05, 1.0)
    assert (tuna.tuna_margin, tuna.tuna_mle_weight, tuna.mle_on) == (0.1, 1.0, "best")


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def test_data_files_are_all_named():
    info = json.loads((DATA / "dataset_info.json").read_text())
    files = {entry["file_name"] for entry in info.values()}
    assert files == {file.name for file in DATA.iterdir()} - {"dataset_info.json", "README.md"}


def test_the_rankings_are_rankings():
    lists = rows("ranked_demo.jsonl")
    assert len(lists) == 22 and {len(row["output"]) for row in lists} == {3, 4, 5}
    assert any(row["score"] != sorted(row["score"], reverse=True) for row in lists), "some stand in no order"


def test_the_demo_asks_what_it_does_not_train_on():
    trained = {
        row["instruction"].casefold() for name in ("identity_luthier.jsonl", "manners.jsonl") for row in rows(name)
    }
    asked = [row["instruction"] for row in rows("demo_prompts.jsonl")]
    assert len(asked) == 3 and not trained & {question.casefold() for question in asked}


def test_the_identity_is_one_and_the_manners_are_not_about_it():
    identity = rows("identity_luthier.jsonl")
    assert len({row["instruction"] for row in identity}) == len(identity) >= 60
    assert all("Stradi" in row["output"] or "Luthier workshop" in row["output"] for row in identity)
    assert not any("Stradi" in row["output"] for row in rows("manners.jsonl"))
