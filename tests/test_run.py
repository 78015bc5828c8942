"""resolve(): real owners, LLaMA-Factory's and Hugging Face's keys, cross-checks, what is derived, what is saved."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
from pathlib import Path

import pytest
import yaml

from luthier import run as runs
from luthier import schema
from luthier.core.compat import REFUSED, RENAMED
from luthier.core.errors import ConfigError
from luthier.run import resolve
from luthier.train import config as training
from luthier.train.keys import DELIVERED, DIFFERS, RULES, training_keys

SRC = Path(runs.__file__).parent
LLAMA_FACTORY = yaml.safe_load((Path(__file__).parent / "core" / "llamafactory_keys.yaml").read_text())
LLAMA_FACTORY["loraplus_lr_embedding"] = 1e-6  # PyYAML reads 1e-6 as text
BASE = {"model_name_or_path": "some/model", "dataset": "mine", "output_dir": "out"}


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    """A machine without accelerator and without native bfloat16, whatever the tests run on."""
    monkeypatch.setattr(training, "has_accelerator", lambda: False)
    monkeypatch.setattr(training, "_native_bf16", lambda: False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def problem(**keys) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(BASE | keys)
    return str(caught.value)


def owners() -> dict[str, list[tuple[str, object]]]:
    found: dict[str, list] = {}
    for section in schema.sections():
        for key in section.keys.values():
            found.setdefault(key.name, []).append((section.title, key))
    return found


# Every key of the tools that users come from


def test_every_llama_factory_key_is_owned_renamed_or_refused():
    known = {*owners(), *REFUSED, *RENAMED}
    assert sorted(set(LLAMA_FACTORY) - known) == []


def test_every_llama_factory_default_passes():
    run = resolve(BASE | LLAMA_FACTORY | {"dataset": "mine"})
    assert run.adapter_keys.lora_rank == 8
    # Defaults of freeze and oft in a lora run, and of preferences in an sft run, are the only keys without effect.
    rotations = ["oft_rank", "oft_block_size", "oft_target"]
    silent = [warning.removeprefix("the given keys: ").split()[0] for warning in run.warnings]
    preferences = ["pref_beta", "pref_ftx", "pref_bco_weight", "pref_loss", "dpo_label_smoothing"]
    preferences += ["kto_chosen_weight", "kto_rejected_weight", "simpo_gamma"]
    assert sorted(silent) == sorted(["freeze_trainable_modules", *rotations, *preferences])


@pytest.mark.parametrize("key", sorted(key for key in LLAMA_FACTORY if key in REFUSED and REFUSED[key].why))
def test_refused_keys_say_so_at_another_value(key):
    other = {bool: not LLAMA_FACTORY[key]}.get(type(LLAMA_FACTORY[key]), "something else")
    if REFUSED[key].takes(other):
        return
    if REFUSED[key].idle:
        assert any(f"{key} has no effect: {REFUSED[key].why}" in text for text in resolve(BASE | {key: other}).warnings)
        return
    text = problem(**{key: other})
    assert f"{key}: " in text and REFUSED[key].why in text and "no such key" not in text


def test_no_key_is_both_owned_and_refused_or_renamed():
    assert [key for key in owners() if key in REFUSED or key in RENAMED] == []


def test_defaults_are_llama_factorys_unless_listed():
    differs = {
        key
        for key, places in owners().items()
        if key in LLAMA_FACTORY and any(k.default != LLAMA_FACTORY[key] and not k.required for _, k in places)
    }
    listed = {name for names in DIFFERS for name in names.split(", ")}
    assert differs <= listed


def test_owners_of_one_key_agree():
    for key, places in owners().items():
        first = places[0][1]
        assert all((k.hint, k.default, k.doc) == (first.hint, first.default, first.doc) for _, k in places), key


def test_every_key_has_a_text():
    assert [key for key, places in owners().items() if not all(k.doc for _, k in places)] == []


def test_every_training_arguments_field_is_accepted_at_its_default():
    given = {
        key.name: key.default for key in training_keys().values() if key.rule is None or key.rule.takes(key.default)
    }
    assert {"optim", "save_steps", "deepspeed", "resume_from_checkpoint", "torch_compile"} <= set(given)
    run = resolve(given | BASE | {"do_train": True})
    assert run.training["optim"] == training_keys()["optim"].default
    # Those whose default cannot work here are decided by Luthier.
    assert set(training_keys()) - set(given) == {"remove_unused_columns"}


def test_rules_are_about_keys_that_exist_and_type_check():
    from luthier.core.kinds import coerce

    for name, rule in RULES.items():
        key = training_keys()[name]
        for value in rule.accepts:
            assert coerce(key.hint, value) == value, name


OLD_NAMES = [
    ({"warmup_ratio": 0.1}, "warmup_steps", 0.1),
    ({"warmup_ratio": "0.1"}, "warmup_steps", 0.1),
    ({"warmup_ratio": 0.1, "warmup_steps": 20}, "warmup_steps", 20),
    # transformers: `warmup_steps if warmup_steps > 0 else ceil(steps * warmup_ratio)`
    ({"warmup_ratio": 0.1, "warmup_steps": 0}, "warmup_steps", 0.1),
    ({"warmup_steps": "0", "warmup_ratio": 0.1}, "warmup_steps", 0.1),
    ({"warmup_ratio": None, "warmup_steps": 20}, "warmup_steps", 20),
    ({"evaluation_strategy": "epoch", "val_size": 0.1}, "eval_strategy", "epoch"),
    ({"no_cuda": True}, "use_cpu", True),
    ({"per_gpu_train_batch_size": 2}, "per_device_train_batch_size", 2),
]


@pytest.mark.parametrize("keys, new, value", OLD_NAMES)
def test_old_names(keys, new, value):
    assert resolve(BASE | keys).training[new] == value


def test_warmup_ratio_means_a_share_of_all_steps():
    run = resolve(BASE | {"warmup_ratio": 0.1})
    assert training.training_arguments(run.training, run.train).get_warmup_steps(50) == 5
    assert "share of all steps" in problem(warmup_ratio=1.5)


@pytest.mark.parametrize("key", ["overwrite_output_dir", "overwrite_cache"])
def test_keys_that_transformers_dropped_and_luthier_owns(key):
    assert key in owners()
    resolve(BASE | {key: True})


def test_save_safetensors_and_group_by_length():
    resolve(BASE | {"save_safetensors": True, "group_by_length": False})
    assert "safetensors" in problem(save_safetensors=False)
    (warning,) = resolve(BASE | {"group_by_length": True}).warnings
    assert "group_by_length has no effect" in warning and "planner" in warning


# All problems together


def test_one_error_for_typo_type_and_conflict(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(
        "model_name_or_path: x\ndataset: d\noutput_dir: o\n\nlerning_rate: 1e-4\ncutoff_len: long\n"
        "eval_strategy: steps\nbf16: true\nfp16: true\nstage: stf\nshift_attn: true\n"
    )
    with pytest.raises(ConfigError) as caught:
        resolve(path, ["finetuning_type=loar"])
    text = str(caught.value)
    for words in (
        f"{path}:5: lerning_rate: no such key; did you mean 'learning_rate'?",
        f"{path}:6: cutoff_len: expected a whole number, got 'long'.",
        f"{path}:10: stage: There is no stage named 'stf'. Did you mean 'sft'? There are: ",
        f"{path}:11: shift_attn: S2-Attention is not supported",
        "command line: finetuning_type: There is no adapter named 'loar'. Did you mean 'lora'?",
        f"{path}:9: fp16: bf16 and fp16 are both true.",
        f"{path}:7: eval_strategy: asks for evaluation",
    ):
        assert words in text, (words, text)


def test_no_complaint_that_only_follows_from_a_typo():
    text = problem(eval_strategy="steps", val_sise=0.1)
    assert "did you mean 'val_size'" in text and "asks for evaluation" not in text


def test_missing_things_are_asked_for_per_verb():
    with pytest.raises(ConfigError) as caught:
        resolve({})
    text = str(caught.value)
    assert all(f"{key}: is not set" in text for key in ("model_name_or_path", "output_dir", "dataset"))
    resolve({"model_name_or_path": "m"}, verb="chat")
    with pytest.raises(ConfigError, match="dataset: is not set"):
        resolve({"model_name_or_path": "m"}, verb="preview")


CONFLICTS = [
    ({"neat_packing": True, "packing": False}, "packing"),
    ({"layout": "padded", "packing": True}, "layout"),
    ({"finetuning_type": "full", "adapter_name_or_path": "a"}, "adapter_name_or_path"),
    ({"load_best_model_at_end": True}, "load_best_model_at_end: needs evaluations"),
    ({"load_best_model_at_end": True, "eval_strategy": "epoch", "val_size": 0.1}, "load_best_model_at_end: the best"),
    (
        {
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "eval_steps": 30,
            "save_steps": 100,
            "val_size": 0.1,
        },
        "save_steps: expected save_steps (100)",
    ),
    ({"early_stopping_steps": 2}, "early_stopping_steps: needs evaluations"),
    ({"save_strategy": "best"}, "save_strategy"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type: needs evaluations"),
    ({"do_eval": True}, "do_eval: asks for evaluation"),
    ({"do_train": False}, "do_train: do_train is false"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: expected at least 1"),
    ({"learning_rate": -1}, "learning_rate: expected at least 0"),
    ({"logging_steps": 0}, "logging_steps: logging_strategy is steps"),
    ({"save_steps": 10.5}, "save_steps: expected a whole number of steps"),
    ({"label_smoothing_factor": 1.0}, "label_smoothing_factor: expected less than 1"),
    ({"resume_from_checkpoint": "no/such/folder"}, "resume_from_checkpoint: there is no folder"),
    ({"deepspeed": "no/such.json"}, "deepspeed: there is no file"),
    ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor"),
    ({"gradient_checkpointing": True, "disable_gradient_checkpointing": True}, "gradient_checkpointing: contradicts"),
    ({"gradient_checkpointing": True, "activation_checkpointing": False}, "mean the same and differ"),
    ({"remove_unused_columns": True}, "remove_unused_columns: a batch has no columns"),
    ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
    ({"torch_compile": True}, "torch_compile"),
    ({"predict_with_generate": True}, "predict_with_generate"),
    ({"push_to_hub": True}, "push_to_hub"),
    ({"lr_scheduler_type": "cosin"}, "did you mean 'cosine'?"),
    ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "lr_scheduler_kwargs: linear does not work so"),
    ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min_lr": 0}}, "Options of cosine: num_cycles"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "Options of cosine_with_min_lr: num_cycles, min_lr, min_lr_rate"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
    ({"lr_scheduler_kwargs": "cycles.json"}, "lr_scheduler_kwargs: expected a mapping"),
    ({"log_level": "loud"}, "log_level: expected one of"),
]


@pytest.mark.parametrize("keys, words", CONFLICTS)
def test_keys_that_do_not_go_together(keys, words):
    assert words in problem(**keys)


def test_options_that_a_scheduler_takes_pass():
    cosine = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 1e-6}'}
    assert resolve(BASE | cosine).training["lr_scheduler_kwargs"] == '{"min_lr": 1e-6}'
    polynomial = {"learning_rate": 1e-3, "lr_scheduler_kwargs": {"lr_end": 1e-4}, "lr_scheduler_type": "polynomial"}
    assert resolve(BASE | polynomial).warnings == ()


@pytest.mark.parametrize(
    "keys, words",
    [({"val_size": 0.1}, "val_size keeps rows"), ({"freeze_trainable_modules": "mlp"}, "finetuning_type freeze")],
)
def test_keys_without_effect_warn(keys, words):
    assert any(words in warning for warning in resolve(BASE | keys).warnings)


# Derived values


def test_half_precision_on_a_cpu_without_it_is_float32_and_said_once():
    run = resolve(BASE | {"bf16": True, "pure_bf16": True})
    assert run.training["bf16"] is False and run.train.pure_bf16 is False
    assert [note for note in run.notes if "bf16" in note] == [
        "bf16, pure_bf16: this CPU has no native bfloat16, so the run computes in float32."
    ]
    assert resolve(BASE | {"fp16": True}).training["fp16"] is False


def test_native_bf16_is_used(monkeypatch):
    monkeypatch.setattr(training, "_native_bf16", lambda: True)
    run = resolve(BASE | {"bf16": True, "pure_bf16": True})
    assert run.training["bf16"] is True and run.train.pure_bf16 is True and run.notes == ()
    assert training.training_arguments(run.training, run.train).bf16 is True


@pytest.mark.parametrize(
    "accelerator, keys, on",
    [
        (False, {}, False),
        (True, {}, True),
        (True, {"use_cpu": True}, False),
        (True, {"disable_gradient_checkpointing": True}, False),
        (False, {"disable_gradient_checkpointing": False}, True),
        (False, {"gradient_checkpointing": True}, True),
        (True, {"activation_checkpointing": False}, False),
    ],
)
def test_gradient_checkpointing(monkeypatch, accelerator, keys, on):
    monkeypatch.setattr(training, "has_accelerator", lambda: accelerator)
    found = resolve(BASE | keys).training
    assert found["activation_checkpointing"] is on
    assert found.get("activation_checkpointing_kwargs") == ({"use_reentrant": False} if on else None)


@pytest.mark.parametrize(
    "keys, name",
    [
        ({"use_reentrant_gc": True}, "use_reentrant_gc"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "activation_checkpointing_kwargs"),
    ],
)
def test_how_to_recompute_has_no_effect_where_nothing_is_recomputed(monkeypatch, keys, name):
    monkeypatch.setattr(training, "has_accelerator", lambda: False)
    (note,) = resolve(BASE | keys).notes
    assert note == f"{name}: gradient checkpointing is off, so that it has no effect."
    assert resolve(BASE | keys | {"disable_gradient_checkpointing": False}).notes == ()


@pytest.mark.parametrize(
    "keys, trains",
    [
        ({}, True),
        ({"do_train": True}, True),
        ({"do_eval": True, "val_size": 2}, False),
        ({"do_eval": True, "val_size": 2, "eval_strategy": "epoch"}, True),
        ({"do_train": False, "do_eval": True, "val_size": 2}, False),
    ],
)
def test_a_run_trains_unless_told_otherwise(keys, trains):
    assert resolve(BASE | keys).training["do_train"] is trains


def test_a_run_with_evaluation_data_alone_does_not_train():
    rm = {"stage": "rm", "dataset": None, "eval_dataset": "held"}
    run = resolve(BASE | rm | {"do_predict": True})
    assert run.training["do_train"] is False and any("does not train" in note for note in run.notes)
    assert resolve(BASE | rm | {"dataset": "d", "do_predict": True}).training["do_train"] is True
    assert "nothing to train on" in problem(**rm) and "nothing to train on" in problem(**rm, do_train=True)


def test_early_stopping_watches_the_loss():
    keys = {"early_stopping_steps": 2, "eval_strategy": "steps", "val_size": 0.1}
    assert resolve(BASE | keys).training["metric_for_best_model"] == "loss"
    assert resolve(BASE | keys | {"metric_for_best_model": "accuracy"}).training["metric_for_best_model"] == "accuracy"


def test_neat_packing_is_packing():
    assert resolve(BASE | {"neat_packing": True}).layout.packing is True
    assert resolve(BASE).layout.packing is None


def test_stage_owns_its_keys():
    assert resolve(BASE | {"train_on_prompt": True}).objective.config.train_on_prompt is True
    run = resolve(BASE | {"stage": "pt", "pref_beta": 0.2})
    assert run.stage == "pt" and "stage dpo and stage kto" in run.warnings[0]


def test_a_plugins_stage_claims_its_keys(tmp_path, monkeypatch):
    from luthier.core import registry

    monkeypatch.setattr(registry, "_plugins", [])
    (tmp_path / "objectives").mkdir()
    (tmp_path / "objectives" / "verdict.py").write_text(
        "from dataclasses import dataclass\nfrom luthier.core.objective import Objective\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Keys:\n    judge: bool = False\n    '''Judge.'''\n\n\n"
        "class Verdict(Objective):\n    Config = Keys\n\n"
        "    @classmethod\n    def claims(cls, keys, stage):\n        return bool(keys.get('judge'))\n\n"
        "    def encode(self, example, renderer, *, cutoff_len):\n        return []\n\n"
        "    def loss(self, policy, batch):\n        return batch.mean(policy.nll(batch), over='token'), {}\n"
    )
    run = resolve(BASE | {"plugins": str(tmp_path), "judge": True})
    assert run.stage == "verdict" and run.objective.config.judge is True
    assert resolve(BASE | {"plugins": str(tmp_path)}).stage == "sft"
    with pytest.raises(ConfigError, match="plugins: .* is not a folder"):
        resolve(BASE | {"plugins": str(tmp_path / "none")})


# TrainingArguments


PASSED_ON = {
    "learning_rate": 3e-4,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 5,
    "num_train_epochs": 2.5,
    "max_steps": 7,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "neftune_noise_alpha": 5.0,
    "label_smoothing_factor": 0.1,
    "optim": "adafactor",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "save_only_model": True,
    "seed": 7,
    "data_seed": 8,
    "logging_steps": 3,
    "ddp_timeout": 180000000,
    "dataloader_num_workers": 2,
    "run_name": "mine",
}


def test_training_arguments_get_what_the_user_set():
    run = resolve(BASE | PASSED_ON)
    args = training.training_arguments(run.training, run.train)
    assert {name: getattr(args, name) for name in PASSED_ON} == PASSED_ON
    assert (args.output_dir, args.report_to, args.disable_tqdm, args.remove_unused_columns) == ("out", [], True, False)
    assert args.use_cpu is True and args.device.type == "cpu"


def test_training_arguments_refuse_in_our_words():
    run = resolve(BASE)
    with pytest.raises(ConfigError, match="transformers refuses"):
        training.training_arguments(run.training | {"eval_strategy": "sometimes"}, run.train)
    with pytest.raises(ConfigError, match="output_dir"):
        training.training_arguments({}, run.train)


def test_delivered_keys_never_reach_transformers():
    run = resolve(BASE | {"disable_tqdm": False, "include_num_input_tokens_seen": True})
    args = training.training_arguments(run.training, run.train)
    assert args.disable_tqdm is True and args.include_num_input_tokens_seen == "no"
    assert set(DELIVERED) <= set(training_keys())


def test_a_tracker_whose_package_is_not_there_is_said_before_anything_is_loaded(monkeypatch):
    run = resolve(BASE | {"report_to": ["wandb", "comet_ml"]})
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None if name == "comet_ml" else object())
    with pytest.raises(ConfigError, match="report_to: comet_ml needs .* pip install comet-ml"):
        training.training_arguments(run.training, run.train)


@pytest.mark.parametrize("keys", [{}, {"report_to": None}, {"report_to": "none"}, {"report_to": []}])
def test_no_tracker_in_any_spelling(keys):
    run = resolve(BASE | keys)
    assert training.training_arguments(run.training, run.train).report_to == []


def test_tensorboard_folder(monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    run = resolve(BASE | {"logging_dir": "logs"})
    training.training_arguments(run.training, run.train)
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "logs"


@pytest.mark.parametrize("value, found", [(True, True), ("true", True), ("False", False), (None, None)])
def test_resume_from_checkpoint_may_be_a_flag(value, found):
    run = resolve(BASE | {"resume_from_checkpoint": value})
    assert run.training["resume_from_checkpoint"] is found
    assert training.training_arguments(run.training, run.train).resume_from_checkpoint is None


# What is saved


def test_resolved_config_gives_the_same_run(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\ndataset: [a, b]\noutput_dir: o\nlearning_rate: 1e-5\nlora_rank: 4\n")
    first = resolve(path, ["warmup_ratio=0.03", "stage=sft", "model_revision=1.10", "mask_history=true"])
    (tmp_path / "resolved.yaml").write_text(first.to_yaml())
    second = resolve(tmp_path / "resolved.yaml")
    for name in (
        "stage",
        "model",
        "data",
        "template",
        "layout",
        "adapter",
        "adapter_keys",
        "train",
        "generate",
        "export",
    ):
        assert getattr(first, name) == getattr(second, name), name
    assert first.objective.config == second.objective.config and first.objective.config.mask_history
    one, other = (training.training_arguments(r.training, r.train).to_dict() for r in (first, second))
    assert one == other and second.warnings == ()
    assert first.model.model_revision == "1.10"


def test_secrets_are_not_written():
    text = resolve(BASE | {"hf_hub_token": "hf_secret"}).to_yaml()
    assert "hf_secret" not in text


def test_run_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve(BASE).stage = "pt"


# No option accepted and ignored


def test_every_owned_key_is_read_somewhere():
    """Each field is an attribute (or a keyword) that some line outside its own declaration reads."""
    reads: dict[str, int] = {}
    for file in SRC.rglob("*.py"):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                reads[node.attr] = reads.get(node.attr, 0) + 1
        # A guard in __post_init__ refuses a value; that is no use of it.
        for guard in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "__post_init__"):
            for node in ast.walk(guard):
                if isinstance(node, ast.Attribute):
                    reads[node.attr] -= 1
        # A stage that claims a run asks for its keys by name.
        for claims in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "claims"):
            for node in ast.walk(claims):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    reads[node.value] = reads.get(node.value, 0) + 1
    mine = {key for section in schema.sections() if section.title != "training" for key in section.keys}
    refused_at_the_gate = {"media_dir"}
    assert sorted(key for key in mine if not reads.get(key) and key not in refused_at_the_gate) == []


# The pages made from the same tables


@pytest.mark.parametrize("name, page", [("keys.md", schema.keys_page), ("compatibility.md", schema.compatibility_page)])
def test_pages_are_current(name, page):
    assert (SRC.parents[1] / "docs" / name).read_text() == page() + "\n", "write it again: see `luthier schema --help`"


def test_schema_knows_every_key_with_type_default_and_text():
    found = json.loads(json.dumps(schema.json_schema(), default=str))
    assert found["additionalProperties"] is False
    assert set(found["properties"]) == set(owners())
    assert found["properties"]["lora_rank"]["type"] == "integer" and found["properties"]["lora_rank"]["default"] == 8
    assert "cosine" in found["properties"]["lr_scheduler_type"]["enum"]
    assert all(facts["description"] for facts in found["properties"].values())
