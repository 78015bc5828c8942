"""Keys that do not go together: every rule with a file that breaks it, one that does not, and where it is said."""

from __future__ import annotations

import json

import pytest

from luthier.core.compat import REFUSED
from luthier.core.errors import ConfigError
from luthier.core.source import read
from luthier.rules import RULES, WORKS, Keys
from luthier.run import resolve
from luthier.train import config as training

BASE = {"model_name_or_path": "some/model", "dataset": "mine", "output_dir": "out"}
FULL = {"finetuning_type": "full"}


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """One process on a CPU; `zero3.json` and `zero2.json` lie in the working folder."""
    monkeypatch.setattr(training, "has_accelerator", lambda: False)
    monkeypatch.setattr(training, "_native_bf16", lambda: False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(tmp_path)
    for stage in (2, 3):
        (tmp_path / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))


# What LLaMA-Factory refuses (its three argument classes' __post_init__, get_train_args, get_infer_args and the checks
# of model against data), as far as it is a contradiction. (keys, the same mended, verb)
THEIRS = [
    ({"train_on_prompt": True, "mask_history": True}, {"mask_history": True}, "train"),
    ({"stage": "dpo", "train_on_prompt": True}, {"stage": "dpo", "train_on_prompt": False}, "train"),
    ({"stage": "pt", "mask_history": True}, {"stage": "pt"}, "train"),
    ({"stage": "kto", "predict_with_generate": True}, {"stage": "kto"}, "train"),
    ({"predict_with_generate": True, "compute_accuracy": True, "eval_dataset": "e"},
     {"compute_accuracy": True}, "train"),
    ({"predict_with_generate": True}, {}, "train"),
    ({"predict_with_generate": True, "deepspeed": "zero3.json", "eval_dataset": "e"}, {}, "train"),
    ({"do_predict": True, "val_size": 0.1}, {"val_size": 0.1, "do_eval": True, "do_train": True}, "train"),
    ({"do_predict": True, "stage": "rm"}, {"do_predict": True, "stage": "rm", "val_size": 0.1}, "train"),
    ({"do_eval": True}, {"do_eval": True, "val_size": 2}, "train"),
    ({"dataset": None, "eval_dataset": "e", "do_train": True, "do_eval": True},
     {"dataset": None, "eval_dataset": "e", "do_train": False, "do_eval": True}, "train"),
    ({"dataset": None, "val_size": 0.1}, {"val_size": 0.1}, "train"),
    ({"val_size": 0.1, "eval_dataset": "e"}, {"eval_dataset": "e"}, "train"),
    ({"interleave_probs": "0.5,0.5"}, {"interleave_probs": "0.5,0.5", "mix_strategy": "interleave_under",
     "dataset": "a,b"}, "train"),
    ({"interleave_probs": "0.5,0.5", "mix_strategy": "interleave_under", "dataset": "a,b,c"},
     {"interleave_probs": [0.5, 0.25, 0.25], "mix_strategy": "interleave_under", "dataset": ["a", "b", "c"]}, "train"),
    ({"streaming": True}, {"streaming": True, "max_steps": 10}, "train"),
    ({"streaming": True, "max_steps": 10, "val_size": 0.1},
     {"streaming": True, "max_steps": 10, "val_size": 5}, "train"),
    ({"streaming": True, "max_steps": 10, "max_samples": 5}, {"max_samples": 5}, "train"),
    ({"streaming": True, "max_steps": 10, "tokenized_path": "t"}, {"tokenized_path": "t"}, "train"),
    ({"adapter_name_or_path": "a", **FULL}, {"adapter_name_or_path": "a"}, "chat"),
    ({"use_rslora": True, **FULL}, {"use_rslora": False, **FULL}, "train"),
    ({"use_dora": True, "finetuning_type": "freeze"}, {"use_dora": True}, "train"),
    ({"pissa_init": True, **FULL}, FULL, "train"),
    ({"loraplus_lr_ratio": 16.0, **FULL}, {"loraplus_lr_ratio": None, **FULL}, "train"),
    ({"pissa_init": True, "stage": "kto"}, {"stage": "kto"}, "train"),
    ({"pissa_init": True, "stage": "dpo"}, {"stage": "dpo"}, "train"),
    ({"pissa_init": True, "deepspeed": "zero3.json"}, {}, "train"),
    ({"use_llama_pro": True, **FULL}, FULL, "train"),
    ({"quantization_bit": 4, **FULL}, FULL, "train"),
    ({"quantization_bit": 4, "resize_vocab": True}, {"resize_vocab": True}, "train"),
    ({"quantization_bit": 4, "create_new_adapter": True, "adapter_name_or_path": "a"},
     {"create_new_adapter": True, "adapter_name_or_path": "a"}, "train"),
    ({"quantization_bit": 4, "adapter_name_or_path": "a,b"}, {"adapter_name_or_path": "a,b"}, "train"),
    ({"quantization_bit": 4, "pissa_init": True}, {}, "train"),
    ({"quantization_bit": 4, "quantization_device_map": "auto"}, {"quantization_device_map": None}, "train"),
    ({"export_quantization_bit": 4, "export_dir": "x"}, {"export_dir": "x"}, "export"),
    ({"quantization_bit": 4, "export_dir": "x"}, {"export_dir": "x"}, "export"),
    ({"image_max_pixels": 10, "image_min_pixels": 20}, {}, "train"),
    ({"video_max_pixels": 10, "video_min_pixels": 20}, {}, "train"),
    ({"use_galore": True, "use_apollo": True, **FULL}, FULL, "train"),
    ({"use_galore": True, "finetuning_type": "lora"}, {}, "train"),
    ({"use_apollo": True, "finetuning_type": "lora"}, {}, "train"),
    ({"use_badam": True, "finetuning_type": "lora"}, {}, "train"),
    ({"use_galore": True, "deepspeed": "zero2.json", **FULL}, FULL, "train"),
    ({"use_apollo": True, "deepspeed": "zero2.json", **FULL}, FULL, "train"),
    ({"galore_layerwise": True, "gradient_accumulation_steps": 2, **FULL}, FULL, "train"),
    ({"apollo_layerwise": True, "gradient_accumulation_steps": 2, **FULL}, FULL, "train"),
    ({"pure_bf16": True, "deepspeed": "zero3.json"}, {"pure_bf16": True, "deepspeed": "zero2.json"}, "train"),
    ({"async_save": True, "deepspeed": "zero2.json"}, {"async_save": True}, "train"),
    ({"loraplus_lr_ratio": 16, "deepspeed": "zero3.json"}, {"loraplus_lr_ratio": 16, "deepspeed": "zero2.json"},
     "train"),
    ({"load_best_model_at_end": True, "save_only_model": True, "deepspeed": "zero2.json", "eval_strategy": "steps",
      "val_size": 2},
     {"load_best_model_at_end": True, "deepspeed": "zero2.json", "eval_strategy": "steps", "val_size": 2}, "train"),
    ({"optim": "adafactor", "deepspeed": "zero2.json"}, {"deepspeed": "zero2.json"}, "train"),
    ({"use_muon": True, "deepspeed": "zero2.json"}, {"use_muon": True}, "train"),
    ({"use_adam_mini": True, "deepspeed": "zero2.json"}, {"use_adam_mini": True}, "train"),
    ({"stage": "dpo", "pref_loss": "hinge", "dpo_label_smoothing": 0.1},
     {"stage": "dpo", "pref_loss": "sigmoid", "dpo_label_smoothing": 0.1}, "train"),
    ({"ref_model_quantization_bit": 3, "stage": "dpo"}, {"ref_model": "m", "ref_model_quantization_bit": 4,
     "stage": "dpo"}, "train"),
    ({"infer_backend": "vllm"}, {"infer_backend": "huggingface"}, "train"),
    ({"infer_backend": "sglang"}, {"infer_backend": "hf"}, "train"),
    ({"infer_backend": "vllm", "quantization_bit": 4}, {}, "chat"),
    ({"infer_backend": "vllm", "rope_scaling": "yarn"}, {}, "chat"),
    ({"infer_backend": "vllm", "adapter_name_or_path": "a,b"}, {"adapter_name_or_path": "a,b"}, "chat"),
    ({"model_name_or_path": None}, {}, "train"),
    ({"push_to_hub": True}, {"push_to_hub": False}, "train"),
]  # fmt: skip

OURS = [
    ({"cutoff_len": 0}, {"cutoff_len": 1}),
    ({"layout": "tight"}, {"layout": "shared"}),
    ({"template": "qwen33"}, {"template": "auto"}),
    ({"template": ""}, {"template": "llama3"}),
    ({"report_to": "wandbb"}, {"report_to": ["wandb", "tensorboard"]}),
    ({"adam_beta1": 1.0}, {"adam_beta1": 0.9}),
    ({"seed": -1}, {"seed": 0}),
    ({"neat_packing": True, "packing": False}, {"neat_packing": True}),
    ({"layout": "padded", "packing": True}, {"layout": "padded", "packing": False}),
    ({"eval_on_each_dataset": True}, {"eval_on_each_dataset": True, "eval_dataset": "e"}),
    ({"create_new_adapter": True}, {"create_new_adapter": True, "adapter_name_or_path": "a"}),
    (
        {"streaming": True, "max_steps": 10, "stage": "dpo", "precompute_reference": True},
        {"stage": "dpo", "precompute_reference": True},
    ),
    (
        {"streaming": True, "max_steps": 10, "use_accept_head_format": True, "freeze_backbone": True},
        {"use_accept_head_format": True, "freeze_backbone": True},
    ),
    ({"fsdp": "full_shard", "deepspeed": "zero2.json"}, {"deepspeed": "zero2.json"}),
    ({"fp8_enable_fsdp_float8_all_gather": True}, {}),
    ({"use_dft_loss": True, "use_eaft_loss": True}, {}),
    ({"use_dft_loss": True, "stage": "dpo"}, {"stage": "dpo"}),
    ({"use_eaft_loss": True, "stage": "dpo"}, {"stage": "dpo"}),
    ({"use_asft_loss": True, "stage": "dpo"}, {"stage": "dpo"}),
    ({"moe_aux_loss_coef": 0.01, "packing": True}, {"moe_aux_loss_coef": 0.01}),
    ({"moe_aux_loss_coef": 0.01, "layout": "shared"}, {"moe_aux_loss_coef": 0.0, "layout": "shared"}),
    ({"use_dora": True, "quantization_bit": 8}, {"use_dora": True, "quantization_bit": 4}),
    ({"activation_offload": True, "disable_gradient_checkpointing": True}, {"activation_offload": True}),
    ({"auto_find_batch_size": True, "fsdp": "full_shard auto_wrap"}, {"auto_find_batch_size": True, "fsdp": "false"}),
    ({"auto_find_batch_size": True, "deepspeed": "zero2.json"}, {"auto_find_batch_size": True}),
    ({"skip_bad_steps": 1, "deepspeed": "zero2.json"}, {"deepspeed": "zero2.json"}),
    ({"skip_bad_steps": 1, "optim": "adalomo"}, {"skip_bad_steps": 1, "optim": "adamw_torch"}),
    (
        {"skip_bad_steps": 1, "use_galore": True, "galore_layerwise": True, **FULL},
        {"skip_bad_steps": 1, "use_galore": True, **FULL},
    ),
]
ALL = [*THEIRS, *((broken, mended, "train") for broken, mended in OURS)]


def refusal(keys: dict, verb: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(BASE | keys, verb=verb)
    return str(caught.value)


@pytest.mark.parametrize("broken, mended, verb", ALL, ids=[", ".join(broken) + f" ({v})" for broken, _, v in ALL])
def test_refused_and_mended(broken, mended, verb):
    text = refusal(broken, verb)
    assert any(f"{key}: " in text for key in broken), text
    assert "no such key" not in text
    resolve(BASE | mended, verb=verb)


def breaks(rule, keys: dict, verb: str) -> bool:
    """Whether a rule objects to these keys, had every one of them an owner."""
    stage = keys.get("stage", "sft")
    foreign = (
        {"train_on_prompt", "mask_history", "use_dft_loss", "use_eaft_loss", "use_asft_loss"}
        if stage != "sft"
        else set()
    )
    if keys.get("finetuning_type", "lora") != "lora":
        foreign |= {"use_rslora", "use_dora", "pissa_init", "loraplus_lr_ratio"}
    values = {"finetuning_type": "lora", "cutoff_len": 2048, "layout": "auto"} | BASE | keys
    owned = {key: value for key, value in values.items() if key not in foreign}
    return bool((not rule.verbs or verb in rule.verbs) and rule.broken(Keys(owned, read(values), stage)))


@pytest.mark.parametrize("rule", RULES, ids=[f"{' '.join(rule.keys)} {nth}" for nth, rule in enumerate(RULES)])
def test_every_rule_is_broken_by_its_case_and_by_no_mended_one(rule, monkeypatch):
    alone = [(b, v) for b, _, v in ALL if breaks(rule, b, v)]
    if not alone:  # Rules about several processes.
        monkeypatch.setenv("WORLD_SIZE", "2")
        several = [{"galore_layerwise": True}, {"apollo_layerwise": True}, {"use_badam": True, "badam_mode": "ratio"},
                   {"use_badam": True}]  # fmt: skip
        alone = [(b, "train") for b in several if breaks(rule, b, "train")]
        monkeypatch.delenv("WORLD_SIZE")
        assert not any(breaks(rule, b, v) for b, v in alone)
    assert alone
    assert [m for _, m, v in ALL if breaks(rule, m, v)] == []
    assert rule.text.format_map(Keys(BASE | alone[0][0], read(alone[0][0]), "sft"))


def test_all_problems_of_a_file_together_with_their_lines(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(
        "model_name_or_path: m\ndataset: a,b\noutput_dir: o\ntrain_on_prompt: true\nmask_history: true\n"
        "interleave_probs: 0.2,0.3,0.5\nmix_strategy: interleave_over\nfinetuning_type: full\nuse_dora: true\n"
        "adapter_name_or_path: x\nval_size: 0.1\neval_dataset: c\npure_bf16: true\ndeepspeed: zero3.json\n"
        "cutoff_lenn: 4\nlearning_rate: fast\n"
    )
    text = refusal_of(path)
    for line, key in ((4, "train_on_prompt"), (6, "interleave_probs"), (9, "use_dora"), (10, "adapter_name_or_path"),
                      (11, "val_size"), (13, "pure_bf16"), (15, "cutoff_lenn"), (16, "learning_rate")):  # fmt: skip
        assert f"{path}:{line}: {key}: " in text, (key, text)


def test_all_problems_of_one_part_together():
    keys = {"max_samples": 0, "val_size": -1, "max_bad_rows": 3, "top_p": 2, "temperature": 0, "lcb_k": -1}
    text = refusal(keys, "train")
    assert text.startswith("6 problems") and all(f"{key}: " in text for key in keys)


def test_a_template_names_the_nearest():
    assert "Did you mean 'qwen3'?" in refusal({"template": "qwen33"}, "chat")


def refusal_of(path) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(path)
    return str(caught.value)


def test_a_rule_is_silent_about_keys_that_are_refused_anyway():
    broken = [(b, v) for b, _, v in ALL if REFUSED.keys() & b and any(breaks(rule, b, v) for rule in RULES)]
    for keys, verb in broken[:3]:
        text = refusal(keys, verb)
        assert all(text.count(f"{key}: ") == (key in REFUSED) for key in keys), text


@pytest.mark.parametrize(
    "keys, stage",
    [
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, 3),
        ({"deepspeed": '{"zero_optimization": {"stage": 2}}'}, 2),
        ({"deepspeed": "zero3.json"}, 3),
        ({"deepspeed": "nothing.json"}, 0),
        ({"deepspeed": "{"}, 0),
        ({"deepspeed": {"zero_optimization": None}}, 0),
        ({}, 0),
    ],
)
def test_zero_stage(keys, stage):
    assert Keys(keys, read(keys), "sft").zero == stage


WORKING = {
    "neat_packing outside stage sft": {"stage": "pt", "neat_packing": True},
    "load_best_model_at_end with stage rm": {
        "stage": "rm", "load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch",
        "val_size": 9,
    },
    "resume_from_checkpoint with stage rm and finetuning_type full or freeze": {
        "stage": "rm", "finetuning_type": "full", "resume_from_checkpoint": True,
    },
    "split_special_tokens with use_fast_tokenizer": {"split_special_tokens": True, "use_fast_tokenizer": True},
    "pure_bf16 on a CPU without bfloat16": {"pure_bf16": True},
    "interleave_probs whose number is not that of the sets in eval_dataset": {
        "dataset": "a,b", "eval_dataset": "c", "interleave_probs": "0.5,0.5", "mix_strategy": "interleave_over",
    },
    "an adapter_name_or_path with several names in a YAML list": {"adapter_name_or_path": ["a", "b"]},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(WORKS))
def test_what_llama_factory_refuses_and_luthier_does(name, tmp_path):
    if name == "a configuration in a JSON file":
        path = tmp_path / "run.json"
        path.write_text(json.dumps(BASE | {"learning_rate": 1e-5}))
        assert resolve(path).training["learning_rate"] == 1e-5
    else:
        resolve(BASE | WORKING[name])
