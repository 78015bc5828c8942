"""Which keys do not go together: a table of rules over the keys of a run, whichever parts own them.

A rule looks at keys by name alone. It holds for a key from the day some part owns it: until then the value is refused
by `core/compat.py`, and a rule is silent about keys that are in doubt already.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from luthier.core.config import Given
from luthier.core.kinds import is_true
from luthier.core.paths import local
from luthier.core.registry import find, names
from luthier.train import config
from luthier.train.config import trains

TRAINS = ("train", "check")
EVALUATES = (*TRAINS, "eval")
NEEDS_DATA = (*EVALUATES, "preview")
REFERENCE_FREE = ("orpo", "simpo")
IN_BACKWARD = ("lomo", "layerwise")
"""Optimisers whose names hold one of these change weights before the whole gradient is known."""
WHOLE_MATRICES = ("adafactor", "galore", "apollo", "lomo", "muon")
"""Parts of the names of optimisers that look at more than one number at a time."""
LAYOUTS = ("auto", "padded", "packed", "shared")


class Keys(Mapping[str, Any]):
    """What every key of a run comes to: the value given, or the default. Nothing is said of a key that is not there."""

    def __init__(self, values: Mapping[str, Any], given: Given, stage: str):
        self._values = dict(given.values) | dict(values) | {"stage": stage}
        self._owned = frozenset(values)
        self.given = given

    def __getitem__(self, key: str) -> Any:
        return self._values.get(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def on(self, key: str) -> bool:
        """Whether a flag is set."""
        return is_true(self[key])

    def stray(self, key: str) -> bool:
        """Whether a key is set that belongs to another stage or finetuning_type."""
        return key not in self._owned and self[key] not in (None, False) and str(self[key]).lower() != "false"

    def count(self, key: str) -> int:
        """How many names a key holds, as a list or separated by commas."""
        value = self[key]
        if isinstance(value, str):
            return len([part for part in value.split(",") if part.strip()])
        return len(value) if isinstance(value, list | tuple) else 0

    @property
    def zero(self) -> int:
        """DeepSpeed's ZeRO stage, 0 without DeepSpeed or where its file cannot be read."""
        settings = self["deepspeed"]
        try:
            if isinstance(settings, str):
                inline = settings.lstrip().startswith("{")
                settings = json.loads(settings if inline else local(settings).read_text(encoding="utf-8"))
            return int((settings or {})["zero_optimization"]["stage"])
        except (OSError, ValueError, TypeError, LookupError):
            return 0

    @property
    def distributed(self) -> bool:
        """Whether this is one of several processes."""
        return os.environ.get("WORLD_SIZE", "1") != "1"

    @property
    def zero_engine(self) -> bool:
        """Whether DeepSpeed trains, by a key or by `accelerate launch`."""
        return bool(self["deepspeed"]) or is_true(os.environ.get("ACCELERATE_USE_DEEPSPEED", ""))

    @property
    def sharded(self) -> bool:
        """Whether FSDP or DeepSpeed trains, by a key or by `accelerate launch`."""
        fsdp = str(self["fsdp"] or "false").lower() != "false"
        return fsdp or self.zero_engine or is_true(os.environ.get("ACCELERATE_USE_FSDP", ""))

    @property
    def steps_in_backward(self) -> bool:
        """Whether the optimiser changes weights while gradients are computed."""
        layerwise = any(self.on(f"use_{name}") and self.on(f"{name}_layerwise") for name in ("galore", "apollo"))
        return layerwise or any(part in str(self["optim"]) for part in IN_BACKWARD)

    @property
    def adapters_load(self) -> bool:
        """Whether finetuning_type continues adapters."""
        kind = str(self["finetuning_type"])
        return kind not in names("adapters") or bool(find("adapters", kind).IS_ADAPTER)


@dataclass(frozen=True)
class Rule:
    """Values that cannot stand in one configuration."""

    keys: tuple[str, ...]
    """What it is about; the first is blamed."""
    broken: Callable[[Keys], Any]
    text: str
    """What is wrong and how to mend it; `{key}` is a key's value."""
    verbs: tuple[str, ...] = TRAINS
    """Where it matters; () everywhere."""


def _memory_optimisers(k: Keys) -> list[str]:
    return [name for name in ("use_galore", "use_apollo", "use_badam") if k.on(name)]


def _losses(k: Keys) -> list[str]:
    return [name for name in ("use_dft_loss", "use_eaft_loss", "use_asft_loss") if k.on(name)]


_ONLY_LORA = "belongs to finetuning_type lora, and this run is {finetuning_type}. Leave it out, or change the type."
_ONLY_SFT = "belongs to stage sft, and this run is {stage}. Leave it out, or change the stage."
_TEXTS = "(`predict_with_generate` writes answers and compares them with the right ones)"

RULES: tuple[Rule, ...] = (
    # data
    Rule(("train_on_prompt", "stage"), lambda k: k.stray("train_on_prompt"), _ONLY_SFT),
    Rule(("mask_history", "stage"), lambda k: k.stray("mask_history"), _ONLY_SFT),
    Rule(("packing", "neat_packing"), lambda k: k["neat_packing"] and k["packing"] is False,
         "packing is false, and neat_packing asks for it. Keep one of the two.", ()),
    Rule(("cutoff_len",), lambda k: k["cutoff_len"] < 1, "expected at least 1 token, got {cutoff_len}.", ()),
    Rule(("layout",), lambda k: k["layout"] not in LAYOUTS,
         f"there is no layout {{layout!r}}. There are: {', '.join(LAYOUTS)}.", ()),
    Rule(("layout", "packing", "neat_packing"),
         lambda k: k["layout"] == "padded" and (k["packing"] or k["neat_packing"]),
         "padded means one answer per row, and packing several. Keep one.", ()),
    Rule(("interleave_probs", "dataset"),
         lambda k: k.count("dataset") and k.count("interleave_probs") not in (0, k.count("dataset")),
         "expected one number for each data set of `dataset`, got {interleave_probs}.", NEEDS_DATA),
    Rule(("eval_on_each_dataset", "eval_dataset"), lambda k: k["eval_on_each_dataset"] and not k["eval_dataset"],
         "has no meaning without eval_dataset, whose sets it tells apart. Name them there, or leave it out."),
    Rule(("dataset", "do_train"), lambda k: k["eval_dataset"] and not k["dataset"] and not k["tokenized_path"]
         and trains(k), "there is nothing to train on. Name the training data, or write do_train: false."),
    Rule(("image_max_pixels", "image_min_pixels"), lambda k: _below(k, "image_max_pixels", "image_min_pixels"),
         "{image_max_pixels} is less than image_min_pixels ({image_min_pixels}). Raise one or lower the other.", ()),
    Rule(("video_max_pixels", "video_min_pixels"), lambda k: _below(k, "video_max_pixels", "video_min_pixels"),
         "{video_max_pixels} is less than video_min_pixels ({video_min_pixels}). Raise one or lower the other.", ()),
    Rule(("streaming", "max_steps"),
         lambda k: k["streaming"] and k["dataset"] and trains(k) and not (k["max_steps"] or -1) > 0,
         "reads rows without end, so max_steps must say when training does. Set it, such as max_steps: 1000."),
    Rule(("streaming", "precompute_reference"), lambda k: k["streaming"] and k["precompute_reference"],
         "asks the reference about every row beforehand, and streaming encodes rows while training. Keep one."),
    Rule(("streaming", "freeze_backbone"), lambda k: k["streaming"] and k.on("freeze_backbone"),
         "reads hidden states of every row beforehand, and streaming encodes rows while training. Keep one."),
    # adapters
    Rule(("adapter_name_or_path", "finetuning_type"), lambda k: k["adapter_name_or_path"] and not k.adapters_load,
         "adapters are loaded with finetuning_type: lora, and this run is {finetuning_type}.", ()),
    Rule(("create_new_adapter", "adapter_name_or_path"),
         lambda k: k["create_new_adapter"] and not k["adapter_name_or_path"],
         "has no meaning without adapter_name_or_path, the adapters to merge first. Leave it out."),
    *(Rule((name, "finetuning_type"), lambda k, name=name: k.stray(name), _ONLY_LORA)
      for name in ("use_rslora", "use_dora", "pissa_init")),
    Rule(("loraplus_lr_ratio", "finetuning_type"),
         lambda k: k["loraplus_lr_ratio"] is not None and k["finetuning_type"] != "lora", _ONLY_LORA),
    Rule(("moe_aux_loss_coef", "layout", "packing"),
         lambda k: k["moe_aux_loss_coef"] and (k["packing"] or k["layout"] in ("packed", "shared")),
         "counts each expert's tokens, which needs padded rows. Leave it out, or layout and packing."),
    Rule(("activation_offload", "disable_gradient_checkpointing"),
         lambda k: k["activation_offload"] and k["disable_gradient_checkpointing"],
         "moves what gradient checkpointing saves, and disable_gradient_checkpointing saves nothing. Keep one."),
    Rule(("quantization_bit", "export_dir"), lambda k: k["quantization_bit"],
         "an adapter is merged into whole weights: leave quantization_bit out, and the full model is loaded.",
         ("export",)),
    Rule(("pissa_init", "stage"), lambda k: k.on("pissa_init")
         and (k["stage"] in ("kto", "ppo") or (k["stage"] == "dpo" and k["pref_loss"] not in REFERENCE_FREE)),
         "stage {stage} compares with the model before training, which PiSSA takes apart. Leave it out."),
    Rule(("pissa_init", "deepspeed"), lambda k: k.on("pissa_init") and k.zero == 3,
         "needs whole weight matrices, which ZeRO-3 cuts up. Use ZeRO-2."),
    Rule(("use_llama_pro", "finetuning_type"), lambda k: k.on("use_llama_pro") and k["finetuning_type"] == "full",
         "trains the added blocks alone, and finetuning_type: full everything. Write freeze or lora."),
    # quantisation
    Rule(("quantization_bit", "finetuning_type"),
         lambda k: k["quantization_bit"] and k["finetuning_type"] not in ("lora", "oft"),
         "quantised weights cannot be trained, and finetuning_type is {finetuning_type}. Write lora.", ()),
    Rule(("resize_vocab", "quantization_bit"), lambda k: k["quantization_bit"] and k["resize_vocab"],
         "the embeddings of a quantised model cannot grow. Resize and export the model first.", ()),
    Rule(("create_new_adapter", "quantization_bit"),
         lambda k: k["quantization_bit"] and k["create_new_adapter"] and k["adapter_name_or_path"],
         "earlier adapters cannot be merged into quantised weights. Export the merged model first."),
    Rule(("adapter_name_or_path", "quantization_bit"),
         lambda k: k["quantization_bit"] and k.count("adapter_name_or_path") > 1,
         "a quantised model takes one adapter. Merge them with `luthier export` first.", ()),
    Rule(("pissa_init", "quantization_bit"), lambda k: k["quantization_bit"] and k.on("pissa_init"),
         "needs the whole weights, which are quantised here. Leave one of the two out."),
    Rule(("use_dora", "quantization_bit"),
         lambda k: k.on("use_dora") and k["quantization_bit"] == 8 and not config.has_accelerator(),
         "8-bit layers of bitsandbytes lose their scales under DoRA on a CPU. Write quantization_bit: 4."),
    Rule(("quantization_device_map", "do_train"), lambda k: k["quantization_device_map"] == "auto" and trains(k),
         "auto spreads a quantised model over devices, which works for inference only. Leave it out."),
    Rule(("export_quantization_dataset", "export_quantization_bit"),
         lambda k: k["export_quantization_bit"] and not k["export_quantization_dataset"],
         "is not set, and export_quantization_bit needs texts to quantise by. Name a data set.", ("export",)),
    # optimisers, precision, processes
    Rule(("use_galore", "use_apollo", "use_badam"), lambda k: len(_memory_optimisers(k)) > 1,
         "use_galore, use_apollo and use_badam are optimisers, and a run has one. Keep one."),
    *(Rule((name, "finetuning_type"), lambda k, name=name: k.on(name) and k["finetuning_type"] == "lora",
           "saves memory where all weights are trained, and this run is lora. Leave it out, or write full.")
      for name in ("use_galore", "use_apollo", "use_badam")),
    *(Rule((f"use_{name}", "deepspeed"), lambda k, name=name: k.on(f"use_{name}") and k["deepspeed"],
           "does not work with deepspeed. Keep one of the two.") for name in ("galore", "apollo")),
    *(Rule((f"{name}_layerwise", "gradient_accumulation_steps"),
           lambda k, name=name: k.on(f"{name}_layerwise") and (k["gradient_accumulation_steps"] or 1) != 1,
           "steps in the middle of the backward pass, so gradient_accumulation_steps must be 1.")
      for name in ("galore", "apollo")),
    *(Rule((f"{name}_layerwise",), lambda k, name=name: k.on(f"{name}_layerwise") and k.distributed,
           "does not work with several processes. Leave it out.") for name in ("galore", "apollo")),
    Rule(("badam_mode", "use_badam"), lambda k: k.on("use_badam") and k["badam_mode"] == "ratio" and k.distributed,
         "ratio does not work with several processes. Write layer."),
    Rule(("use_badam", "deepspeed"), lambda k: k.on("use_badam") and k["badam_mode"] != "ratio" and k.distributed
         and k.zero != 3, "works with several processes under DeepSpeed ZeRO-3 only."),
    Rule(("pure_bf16", "deepspeed"), lambda k: k["pure_bf16"] and k.zero == 3,
         "ZeRO-3 keeps float32 weights itself. Write bf16: true instead."),
    Rule(("fp8_enable_fsdp_float8_all_gather", "fp8"),
         lambda k: k.on("fp8_enable_fsdp_float8_all_gather") and not k.on("fp8"),
         "has no meaning without fp8: true."),
    Rule(("fsdp", "deepspeed"), lambda k: k["fsdp"] and k["deepspeed"],
         "fsdp and deepspeed both shard the model. Keep one of the two."),
    Rule(("loraplus_lr_ratio", "deepspeed"), lambda k: k["loraplus_lr_ratio"] is not None and k.zero == 3,
         "has two learning rates, and under ZeRO-3 steps with them come out wrong. Use ZeRO-2."),
    Rule(("async_save", "deepspeed"), lambda k: k.on("async_save") and k["deepspeed"],
         "DeepSpeed's processes write their parts together, between two steps. Leave one of the two out."),
    Rule(("load_best_model_at_end", "save_only_model", "deepspeed"),
         lambda k: k["deepspeed"] and k.on("load_best_model_at_end") and k.on("save_only_model"),
         "DeepSpeed loads whole checkpoints only. Leave save_only_model out."),
    Rule(("optim", "deepspeed"), lambda k: k["deepspeed"] and any(part in str(k["optim"]) for part in WHOLE_MATRICES),
         "{optim} goes by rows and columns of weights, and ZeRO hands it flat pieces. Use adamw_torch."),
    *(Rule((name, "deepspeed"), lambda k, name=name: k.on(name) and k["deepspeed"],
           "goes by rows and columns of weights, and ZeRO hands it flat pieces. Keep one of the two.")
      for name in ("use_muon", "use_adam_mini")),
    Rule(("auto_find_batch_size", "fsdp", "deepspeed"), lambda k: k.on("auto_find_batch_size") and k.sharded,
         "does not go with FSDP or DeepSpeed, whose processes compute in step: one that began a step again would wait "
         "for the others for ever. Lower per_device_train_batch_size."),
    Rule(("skip_bad_steps", "deepspeed", "optim", "galore_layerwise", "apollo_layerwise"),
         lambda k: k["skip_bad_steps"] and (k.zero_engine or k.steps_in_backward),
         "{skip_bad_steps} cannot be kept: DeepSpeed, LOMO and layerwise optimisers change weights before the whole "
         "gradient is known. Leave one of the two out."),
    # losses and metrics
    Rule(("use_dft_loss", "use_eaft_loss", "use_asft_loss"), lambda k: len(_losses(k)) > 1,
         "use_dft_loss, use_eaft_loss and use_asft_loss each replace the loss. Keep one."),
    *(Rule((name, "stage"), lambda k, name=name: k.stray(name), _ONLY_SFT)
      for name in ("use_dft_loss", "use_eaft_loss", "use_asft_loss")),
    Rule(("predict_with_generate", "stage"), lambda k: k.on("predict_with_generate") and k["stage"] != "sft",
         f"belongs to stage sft, and this run is {{stage}} {_TEXTS}."),
    Rule(("predict_with_generate", "eval_dataset"),
         lambda k: k.on("predict_with_generate") and not k["eval_dataset"] and not k["val_size"],
         f"there is nothing to answer {_TEXTS}. Set eval_dataset or val_size."),
    Rule(("predict_with_generate", "compute_accuracy"),
         lambda k: k.on("predict_with_generate") and k["compute_accuracy"],
         f"compute_accuracy looks at given answers, and this at written ones {_TEXTS}. Keep one."),
    Rule(("predict_with_generate", "deepspeed"), lambda k: k.on("predict_with_generate") and k.zero == 3,
         "ZeRO-3 gathers every weight for every token. Use ZeRO-2, or `luthier infer` after training."),
    # inference engines
    Rule(("infer_backend",), lambda k: k["infer_backend"] not in (None, "hf", "huggingface"),
         "{infer_backend} answers prompts and does not train; it is for chat, infer and api. Leave it out."),
    *(Rule(("infer_backend", name), lambda k, name=name: k["infer_backend"] == "vllm" and k[name],
           f"vllm does not work with {name}. Leave one of the two out.", ("chat", "infer", "api", "serve"))
      for name in ("quantization_bit", "rope_scaling")),
    Rule(("infer_backend", "adapter_name_or_path"),
         lambda k: k["infer_backend"] == "vllm" and k.count("adapter_name_or_path") > 1,
         "vllm takes one adapter. Merge them with `luthier export` first.", ("chat", "infer", "api", "serve")),
)  # fmt: skip
"""LLaMA-Factory refuses the same, and Luthier a few more."""

WORKS: dict[str, str] = {
    "neat_packing outside stage sft": "packed examples never see each other, in any stage",
    "load_best_model_at_end with stage rm": "the head is saved and loaded with its checkpoint",
    "resume_from_checkpoint with stage rm and finetuning_type full or freeze": "the head is part of a checkpoint",
    "split_special_tokens with use_fast_tokenizer": "transformers 5 has one tokenizer class per model",
    "pure_bf16 on a CPU without bfloat16": "the run computes in float32 and says so",
    "interleave_probs whose number is not that of the sets in eval_dataset": "evaluation sets are not interleaved",
    "an adapter_name_or_path with several names in a YAML list": "a list and a text with commas mean the same",
    "a configuration in a JSON file": "JSON and YAML mean the same",
}
"""What LLaMA-Factory refuses (or crashes at) and Luthier does, and why it can, for docs/compatibility.md."""


def _below(keys: Keys, high: str, low: str) -> bool:
    numbers = [keys[name] for name in (high, low)]
    return all(isinstance(number, int | float) for number in numbers) and numbers[0] < numbers[1]
