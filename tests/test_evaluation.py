"""`luthier eval` gives what the training's own evaluation gave, for what was trained; it changes nothing there."""

from __future__ import annotations

import hashlib
import json
import math
import random

import pytest
import torch
import transformers
import yaml

from luthier import evaluation
from luthier.cli import main
from luthier.commands import parse_command
from luthier.core.errors import ConfigError
from luthier.train.keys import training_keys
from tests.conftest import save_lively_model

WORDS = "violin luthier scroll bridge maple spruce varnish peg bow string".split()
STAGES = {
    "sft-lora": {"stage": "sft", "finetuning_type": "lora", "compute_accuracy": True, "lora_dropout": 0.1},
    "pt-full": {"stage": "pt", "finetuning_type": "full", "dataset": "docs.jsonl", "train_from_scratch": True},
    "dpo-lora": {"stage": "dpo", "finetuning_type": "lora", "dataset": "pairs.jsonl", "do_predict": True},
    "dpo-full": {"stage": "dpo", "finetuning_type": "full", "dataset": "pairs.jsonl"},
    "rm-freeze": {"stage": "rm", "finetuning_type": "freeze", "freeze_trainable_layers": 1, "dataset": "pairs.jsonl"},
    "accept-lora": {"stage": "sft", "replace_lm_head": True, "finetuning_type": "lora", "dataset": "rounds"},
    "accept-head-alone": {"stage": "accept_head", "freeze_backbone": True, "dataset": "rounds"},
}
REPORTS = {
    "rm-freeze": "preference_report.json",
    "accept-lora": "accept_report.json",
    "accept-head-alone": "accept_report.json",
}
SPEEDS = ("_runtime", "_per_second", "epoch")


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def shop(model_folder, tmp_path_factory):
    """A folder with a lively model and its data sets."""
    folder = tmp_path_factory.mktemp("eval")
    save_lively_model(model_folder, folder / "model")
    rng = random.Random(0)

    def say():
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 8)))

    write(folder / "rows.jsonl", [{"instruction": say(), "output": say()} for _ in range(24)])
    write(folder / "other.jsonl", [{"instruction": say(), "output": say()} for _ in range(3)])
    write(folder / "docs.jsonl", [{"text": f"{say()}. {say()}"} for _ in range(24)])
    pairs = [{"instruction": say(), "chosen": say(), "rejected": say()} for _ in range(24)]
    write(folder / "pairs.jsonl", pairs)
    (folder / "rounds").mkdir()
    names = [f"request {n}" for n in range(12)]
    write(folder / "rounds" / "train.jsonl", [speculated(rng, name, 3 + 5 * k) for name in names for k in range(4)])
    texts = [{"req_id": name, "user_text": say(), "assistant_text": f" {say()} {say()}"} for name in names]
    write(folder / "rounds" / "context.jsonl", texts)
    return folder


def speculated(rng, name, context):
    """A round of four draft tokens, of which the second and perhaps the last were refused."""
    draft = [rng.randrange(7, 300) for _ in range(4)]
    wrong = [1, 3] if rng.random() < 0.5 else [1]
    verifier = [token + (i in wrong) for i, token in enumerate(draft)]
    return {
        "idx": 0, "req_id": name, "context_len": context, "spd_round_draft_ids": draft,
        "spd_round_verifier_ids": verifier, "mismatch_index": wrong,
        "mismatch_score": [rng.choice(["0", "3", "8", "10"]) for _ in wrong],
        "mismatch_kl": [rng.random() for _ in wrong],
    }  # fmt: skip


def config(shop, name, **changes):
    """A training file of a stage; everything it writes lies in a folder of its own."""
    keys = {
        "model_name_or_path": str(shop / "model"), "template": "chatml", "data_cache_dir": str(shop / "cache"),
        "dataset": "rows.jsonl", "dataset_dir": str(shop), "cutoff_len": 128, "learning_rate": 1e-2, "max_steps": 4,
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 3, "val_size": 5, "do_eval": True,
        "eval_strategy": "steps", "eval_steps": 4, "save_steps": 2, "logging_steps": 2, "use_cpu": True,
        "overwrite_output_dir": True, "seed": 11, "output_dir": str(shop / name),
    } | STAGES.get(name, {}) | changes  # fmt: skip
    if keys["dataset"] == "pairs.jsonl":
        keys["dataset"] = [{"path": str(shop / "pairs.jsonl"), "ranking": True}]
    if keys["dataset"] == "rounds":
        keys["dataset"] = [{"path": str(shop / "rounds" / "train.jsonl"), "format": "accept_head"}]
    file = shop / f"{name}.yaml"
    file.write_text(yaml.safe_dump(keys))
    return file


@pytest.fixture(scope="module")
def trained(shop):
    """name -> the YAML file of a training that was done; each is done once."""
    done = {}

    def train(name):
        if name not in done:
            done[name] = config(shop, name)
            assert main(["train", str(done[name])]) == 0
        return done[name]

    return train


def results(folder):
    found = json.loads((folder / "eval_results.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    return {name: value for name, value in found.items() if not name.endswith(SPEEDS)}


def fingerprint(folder):
    """Every file below a folder, but for what evaluation left there."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.relative_to(folder).parts[0] != "eval"]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.parametrize("name", STAGES)
def test_it_is_the_evaluation_that_ended_the_training(shop, trained, name):
    file = trained(name)
    before = fingerprint(shop / name)
    assert main(["eval", str(file)]) == 0
    assert fingerprint(shop / name) == before, "checkpoints and weights are left alone"
    found = results(shop / name / "eval")
    expected = {key: value for key, value in results(shop / name).items() if key.startswith("eval_")}
    assert {"eval_loss", *expected} == {"eval_loss", *found}
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert (shop / name / "eval" / "generated_predictions.jsonl").exists() == (name == "dpo-lora" or name in REPORTS)
    assert [file.name for file in (shop / name / "eval").glob("*_report.json")] == [*filter(None, [REPORTS.get(name)])]
    assert ("eval_perplexity" in found) == (name in ("sft-lora", "pt-full"))
    if "eval_perplexity" in found:
        assert found["eval_perplexity"] == pytest.approx(math.exp(found["eval_loss"]))


def test_the_trained_model_is_compared_with_the_one_from_before(shop, trained):
    """Weights that were trained whole have replaced their reference: rewards would all be 0 without it."""
    assert results(trained("dpo-full").parent / "dpo-full")["eval_rewards/margins"] != 0
    assert main(["eval", str(shop / "dpo-full"), "--output", str(shop / "by-folder")]) == 0
    assert results(shop / "by-folder")["eval_rewards/margins"] == pytest.approx(
        results(shop / "dpo-full")["eval_rewards/margins"], rel=1e-5
    )


def test_a_new_adapter_on_a_merged_one(shop, trained):
    """Its reference has the earlier adapter, which training merged, and not the new one."""
    trained("sft-lora")
    earlier = {"adapter_name_or_path": str(shop / "sft-lora"), "create_new_adapter": True, "do_predict": False}
    file = config(shop, "second", **STAGES["dpo-lora"] | earlier)
    assert main(["train", str(file)]) == main(["eval", str(file)]) == 0
    found, expected = results(shop / "second" / "eval"), results(shop / "second")
    assert found["eval_rewards/margins"] != 0
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-5, abs=1e-6)


def test_as_it_is_before_training(shop, trained):
    file = trained("sft-lora")
    assert main(["eval", str(file), "--as-is", "eval_dataset=other.jsonl"]) == 0
    found = results(shop / "sft-lora" / "eval-as-is")
    model = transformers.AutoModelForCausalLM.from_pretrained(shop / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(shop / "model")
    losses = []
    for line in (shop / "other.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = f"<|im_start|>user\n{row['instruction']}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(prompt)["input_ids"]
        answer = tokenizer(f"{row['output']}<|im_end|>\n")["input_ids"]
        with torch.no_grad():
            logp = model(torch.tensor([[*ids, *answer]])).logits[0].log_softmax(-1)
        losses += [-float(logp[len(ids) - 1 + i, token]) for i, token in enumerate(answer)]
    assert found["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    # The rows that are named took the place of those that were held out; the rest of the data need not even be there.
    elsewhere = ["eval_dataset=other.jsonl", "dataset=gone.jsonl"]
    assert main(["eval", str(shop / "sft-lora"), "--output", str(shop / "named"), *elsewhere]) == 0
    assert results(shop / "named")["eval_loss"] < found["eval_loss"]


def test_a_checkpoint_is_one_too(shop, trained):
    trained("sft-lora")
    folder = shop / "sft-lora"
    before = fingerprint(folder)
    assert main(["eval", str(folder / "checkpoint-2")]) == main(["eval", str(folder / "checkpoint-4")]) == 0
    assert fingerprint(folder) == before
    second, fourth = (results(folder / "eval" / f"checkpoint-{step}") for step in (2, 4))
    assert fourth["eval_loss"] == pytest.approx(results(folder)["eval_loss"], rel=1e-5)
    assert abs(second["eval_loss"] - fourth["eval_loss"]) > 1e-3


def test_a_model_named_on_the_command_line_is_taken_as_it_is(shop, trained, caplog):
    file = trained("pt-full")
    subject = evaluation.subject_of(parse_command([str(file), f"model_name_or_path={shop / 'model'}"], "eval"))
    assert (subject.trained, subject.output) == (None, shop / "pt-full" / "eval-as-is")
    assert subject.run.model.model_name_or_path == str(shop / "model")
    subject = evaluation.subject_of(parse_command([str(file)], "eval"))
    assert (subject.trained, subject.output) == (shop / "pt-full", shop / "pt-full" / "eval")
    assert subject.run.model.model_name_or_path == str(shop / "pt-full")


def test_several_sets_have_their_own_names(shop, trained):
    sets = "eval_dataset=rows.jsonl,other.jsonl"
    out = shop / "each"
    assert main(["eval", str(trained("sft-lora")), sets, "eval_on_each_dataset=true", "--output", str(out)]) == 0
    found = results(out)
    assert {"eval_rows.jsonl_loss", "eval_other.jsonl_perplexity"} <= set(found) and "eval_loss" not in found


def test_without_rows_to_hold_out_it_says_what_it_measures_on(shop, caplog):
    file = config(shop, "plain", val_size=0, output_dir=None)
    with caplog.at_level("INFO", logger="luthier"):
        assert main(["eval", str(file), "--output", str(shop / "plain-out")]) == 0
    assert "neither eval_dataset nor val_size is set: this measures on dataset itself (rows.jsonl)" in caplog.text
    assert "as it is" in caplog.text and results(shop / "plain-out")["eval_loss"] > 0
    assert main(["eval", str(file)]) == 2, "nowhere to write"


def test_what_cannot_be_evaluated_says_why(shop, tmp_path, capsys):
    assert main(["eval", str(config(shop, "headless", stage="rm", dataset="pairs.jsonl"))]) == 2
    assert "value_head.safetensors" in capsys.readouterr().err
    unfinished = config(shop, "unfinished")
    (shop / "unfinished" / "checkpoint-3").mkdir(parents=True)
    (shop / "unfinished" / "checkpoint-3" / "trainer_state.json").write_text("{}")
    with pytest.raises(ConfigError, match="only checkpoints.*luthier eval .*checkpoint-3.*--as-is"):
        evaluation.subject_of(parse_command([str(unfinished)], "eval"))
    assert evaluation.subject_of(parse_command([str(unfinished), "--as-is"], "eval")).trained is None
    with pytest.raises(ConfigError, match="was not left behind by `luthier train`"):
        evaluation.subject_of(parse_command([str(tmp_path)], "eval"))
    with pytest.raises(ConfigError, match="do_predict.*does not judge answers"):
        evaluation.subject_of(parse_command([str(config(shop, "sft-lora-2")), "do_predict=true"], "eval"))


def test_keys_of_training_alone_are_put_aside(shop, caplog):
    """A finished training's file is full of them; and what they would demand is not there."""
    file = config(
        shop, "loaded", load_best_model_at_end=True, early_stopping_steps=2, metric_for_best_model="loss",
        lr_scheduler_type="reduce_lr_on_plateau", bf16=True, label_smoothing_factor=0.1, report_to="tensorboard",
    )  # fmt: skip
    run = evaluation.subject_of(parse_command([str(file)], "eval")).run
    assert run.train.early_stopping_steps is None and not run.training["do_train"]
    assert run.training["label_smoothing_factor"] == 0.1 and run.training["per_device_eval_batch_size"] == 3
    assert not {"lr_scheduler_type", "load_best_model_at_end", "report_to", "save_steps"} & set(run.training)
    assert set(evaluation.KEPT) <= set(training_keys())
