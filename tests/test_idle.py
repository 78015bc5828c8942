"""Keys that change nothing in a run are named, with the reason; keys that do something, or ask for nothing, are not."""

from __future__ import annotations

import pytest

from luthier.idle import TABLE
from luthier.run import resolve

BASE = {"model_name_or_path": "some/model", "dataset": "mine", "output_dir": "out"}
EVALUATES = {"val_size": 4, "eval_strategy": "steps", "eval_steps": 5}
FULL = {"finetuning_type": "full"}

CASES = [
    # (keys, the one warning of them, what makes it go away)
    ({"eval_dataset": "other", "do_train": True}, "eval_dataset has no effect: nothing evaluates it",
     {"do_eval": True}),
    ({"per_device_eval_batch_size": 2, "metric_for_best_model": "accuracy"},
     "per_device_eval_batch_size, metric_for_best_model have no effect: nothing is evaluated", EVALUATES),
    ({"eval_steps": 5}, "eval_steps has no effect: nothing is evaluated while training", EVALUATES),
    ({"eval_delay": 5}, "eval_delay has no effect: nothing is evaluated while training", EVALUATES),
    ({"eval_steps": 5, "val_size": 4, "eval_strategy": "epoch"}, "eval_steps has no effect: eval_strategy is epoch",
     {"eval_strategy": "steps"}),
    ({"save_steps": 5, "save_strategy": "epoch"}, "save_steps has no effect: save_strategy is epoch",
     {"save_strategy": "steps"}),
    ({"save_total_limit": 5, "save_strategy": "no"}, "save_total_limit has no effect: save_strategy is no",
     {"save_strategy": "epoch"}),
    ({"logging_steps": 5, "logging_strategy": "epoch"}, "logging_steps has no effect: logging_strategy is epoch",
     # where eval_steps is not set, evaluation goes by logging_steps
     {"val_size": 4, "eval_strategy": "steps"}),
    ({"run_name": "mine"}, "run_name has no effect: report_to names no tracker", {"report_to": "wandb"}),
    ({"logging_dir": "tb", "report_to": "wandb"}, "logging_dir has no effect: report_to does not name tensorboard",
     {"report_to": ["wandb", "tensorboard"]}),
    ({"project": "mine", "trackio_space_id": "a/b"}, "project, trackio_space_id have no effect: report_to does not",
     {"report_to": "all"}),
    ({"warmup_ratio": 0.1, "lr_scheduler_type": "constant"},
     "warmup_steps has no effect: lr_scheduler_type: constant has no warm-up; constant_with_warmup has one",
     {"lr_scheduler_type": "constant_with_warmup"}),
    ({"warmup_steps": 9, "lr_scheduler_type": "constant"}, "warmup_steps has no effect",
     {"optim": "schedule_free_adamw"}),
    ({"lr_scheduler_kwargs": {"a": 1}, "lr_scheduler_type": "constant"},
     "lr_scheduler_kwargs has no effect: lr_scheduler_type",
     {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 0.5}}),
    ({"label_smoothing_factor": 0.1, "stage": "dpo"}, "label_smoothing_factor has no effect: the loss of stage dpo",
     {"stage": "sft"}),
    ({"mix_strategy": "interleave_under"}, "mix_strategy has no effect: there is one data set", {"dataset": "a,b"}),
    ({"adapter_folder": "sub"}, "adapter_folder has no effect: adapter_name_or_path is not set",
     {"adapter_name_or_path": "some/adapter"}),
    ({"additional_target": "embed_tokens", **FULL}, "additional_target has no effect: finetuning_type: full",
     {"finetuning_type": "lora"}),
    ({"quantization_type": "fp4", "quantization_bit": 8}, "quantization_type has no effect: it is for quantization_bit",
     {"quantization_bit": 4}),
    ({"double_quantization": False}, "double_quantization has no effect: it is", {"quantization_bit": 4}),
    ({"pissa_iter": 4}, "pissa_iter has no effect: pissa_init is not set", {"pissa_init": True}),
    ({"galore_rank": 4, "galore_scale": 1.0, **FULL}, "galore_rank, galore_scale have no effect: use_galore is not set",
     {"use_galore": True}),
    ({"apollo_rank": 4, **FULL}, "apollo_rank has no effect: use_apollo is not set", {"use_apollo": True}),
    ({"badam_verbose": 1, **FULL}, "badam_verbose has no effect: use_badam is not set", {"use_badam": True}),
    ({"loraplus_lr_embedding": 1e-3}, "loraplus_lr_embedding has no effect: loraplus_lr_ratio is not set",
     {"loraplus_lr_ratio": 16}),
    ({"optim_target_modules": "mlp"}, "optim_target_modules has no effect: it is for optim: galore_... and apollo_..., "
     "and optim is adamw_torch_fused", {"optim": "galore_adamw"}),
    ({"liger_kernel_config": {"rope": False}}, "liger_kernel_config has no effect: use_liger_kernel is not set",
     {"use_liger_kernel": True}),
    ({"max_steps": 0}, "no step will be taken, as max_steps: 0 (-1 lets num_train_epochs decide)", {"max_steps": 5}),
    ({"num_train_epochs": 0}, "no step will be taken, as num_train_epochs: 0 says", {"max_steps": 5}),
]  # fmt: skip


@pytest.mark.parametrize("keys, words, mended", CASES, ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_a_key_without_effect_is_said_with_the_reason(keys, words, mended):
    (warning,) = resolve(BASE | keys).warnings
    assert words in warning
    assert resolve(BASE | keys | mended).warnings == ()


def test_every_row_of_the_table_has_a_case():
    told = "\n".join(words for _, words, _ in CASES)
    assert [row for row in TABLE if f"no effect: {row.why.partition('{')[0][:12]}" not in told] == []


def test_defaults_that_are_written_out_ask_for_nothing():
    flat = resolve(BASE).flat()
    assert flat["galore_rank"] == 16 and resolve(flat).warnings == ()


def test_what_is_for_training_is_not_said_of_a_chat():
    keys = {"model_name_or_path": "some/model", "eval_steps": 5, "galore_rank": 4, "adapter_folder": "sub"}
    (warning,) = resolve(keys, verb="chat").warnings
    assert warning == "adapter_folder has no effect: adapter_name_or_path is not set."
