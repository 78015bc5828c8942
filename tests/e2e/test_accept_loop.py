"""Rounds collected, an accept head trained on them, and what it does to decoding: the whole loop on a tiny model."""

from __future__ import annotations

import json

import pytest

from luthier.cli import main
from luthier.engines.speculate import Speculator
from luthier.speculative import find_fast, load_fast
from tests.conftest import save_lively_model

PROMPTS = ["Hello world", "one two three", "The quick brown fox", "a luthier carves the scroll"]
WAYS = {
    "a frozen judge": {"stage": "accept_head", "accept_layout": "judge", "freeze_backbone": True},
    # The keys of the seed's own example: stage sft, and lm_head among the modules trained in full.
    "sep with LoRA": {
        "stage": "sft",
        "replace_lm_head": True,
        "use_accept_head_format": True,
        "additional_target": "lm_head",
        "lora_rank": 4,
    },
}


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    return save_lively_model(model_folder, tmp_path_factory.mktemp("loop-model"))


@pytest.fixture(scope="module")
def rounds(folder, tmp_path_factory):
    """What `luthier collect` writes about four prompts."""
    home = tmp_path_factory.mktemp("rounds")
    (home / "in.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    keys = [f"model_name_or_path={folder}", "use_cpu=true", "do_sample=false", "max_new_tokens=12"]
    keys += ["draft=early_exit", "draft_layers=1", "draft_tokens=3", "collect_scorer=prob", "collect_mismatches=all"]
    assert main(["collect", *keys, "--input", str(home / "in.jsonl"), "--output", str(home / "out")]) == 0
    return home


@pytest.mark.parametrize("way", WAYS)
def test_what_was_trained_decodes(folder, rounds, tmp_path, way):
    keys = {
        "model_name_or_path": str(folder),
        "dataset": "rounds",
        "dataset_dir": str(rounds / "out"),
        "output_dir": str(tmp_path / "head"),
        "max_steps": 4,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        **WAYS[way],
    }
    config = tmp_path / "train.yaml"
    config.write_text(json.dumps(keys))
    assert main(["train", str(config)]) == 0

    speaks = ["draft=early_exit", "draft_layers=1", "draft_tokens=3", "max_new_tokens=12", "--compare"]
    files = ["--input", str(rounds / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main(["speculate", str(tmp_path / "head"), *files, *speaks, "accept_threshold=-1"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for line in lines:
        ways = line["ways"]
        assert ways["judge"]["kept"] == ways["judge"]["drafted"] > 0
        assert ways["lossless"]["predict"] == ways["plain"]["predict"]
    # The target is the model as it was when the rounds were collected, whatever was trained with the head.
    answers = _collected(rounds)
    fast = load_fast(find_fast(tmp_path / "head", [key for key in speaks if "=" in key]))
    plain = Speculator(fast.engine.speculator.target, None)
    for prompt, answer in answers:
        found = [token for done in plain.rounds(prompt, 12, fast.speaker.renderer.stop_ids) for token in done.ids]
        assert found == answer


def _collected(rounds):
    lines = [json.loads(line) for line in (rounds / "out" / "context.jsonl").read_text().splitlines()]
    return [(line["prompt_ids"], line["answer_ids"]) for line in lines]
